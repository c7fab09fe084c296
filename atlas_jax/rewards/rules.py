# SPDX-License-Identifier: Apache-2.0
"""Rule-based rewards for format, length and correct answers.

Each is a `types.RewardFn` or returns one. `combine` computes a weighted sum.
"""

from collections.abc import Callable, Mapping, Sequence

from atlas_jax import errors, types
from atlas_jax.rewards import isolated

# Compares pairs of a student's answer and a reference.
Verify = Callable[[Sequence[tuple[str, str]]], list[isolated.Answer]]


def well_formed(records: Sequence[types.TeachingRecord]) -> list[types.Reward]:
  """Returns 1 for each finished completion with a teaching, else 0."""
  return [
    types.Reward(
      float(
        record.teaching is not None
        and record.teacher_rollout.completion.finish_reason == "stop"
      )
    )
    for record in records
  ]


def exact(records: Sequence[types.TeachingRecord]) -> list[types.Reward]:
  """Returns the fraction of taught answers that are correct.

  Raises:
    ValueError: if a record is not graded.
  """
  return [_exact(record) for record in records]


def soft_overlong(
  num_tokens: int, *, max_tokens: int, soft_fraction: float
) -> float:
  """Returns DAPO's soft overlong penalty, in [-1, 0].

  It is 0 up to (1 - soft_fraction) * max_tokens, and falls linearly to -1 at
  max_tokens.

  Source: Yu et al., DAPO, arXiv:2503.14476, equation 13, in tokens.
  """
  left = 1.0 - num_tokens / max_tokens
  return -min(1.0, max(0.0, 1.0 - left / soft_fraction))


def overlong(*, soft_fraction: float, max_tokens: int) -> types.RewardFn:
  """Returns a reward function of completion length, see `soft_overlong`.

  Args:
    soft_fraction: fraction of the limit over which the penalty grows.
    max_tokens: maximum length of a completion.

  Raises:
    errors.ConfigError: if `soft_fraction` is not in (0, 1].
  """
  if not 0.0 < soft_fraction <= 1.0:
    raise errors.ConfigError(
      f"soft_fraction must be in (0, 1], got {soft_fraction}.",
      where=f"--config.reward.overlong.soft_fraction={soft_fraction}",
      why="The penalty grows over this fraction of the token limit.",
      fix="Set it to 0.2, as DAPO does.",
    )

  def reward_fn(records: Sequence[types.TeachingRecord]) -> list[types.Reward]:
    return [
      types.Reward(
        soft_overlong(
          len(record.teacher_rollout.completion.token_ids),
          max_tokens=max_tokens,
          soft_fraction=soft_fraction,
        )
      )
      for record in records
    ]

  return reward_fn


def math_verify(verify: Verify) -> types.RewardFn:
  """Returns a reward function: the fraction of answers math-verify accepts.

  If one answer fails or takes too long, or the reference cannot be parsed, the
  record's reward is missing.
  """

  def reward_fn(records: Sequence[types.TeachingRecord]) -> list[types.Reward]:
    pairs = dict.fromkeys(
      (attempt.text, record.question.answer)
      for record in records
      for attempt in record.taught
    )
    found = dict(zip(pairs, verify(list(pairs)), strict=True))
    return [_math(record, found) for record in records]

  return reward_fn


def _math(
  record: types.TeachingRecord,
  found: Mapping[tuple[str, str], isolated.Answer],
) -> types.Reward:
  graded = [found[a.text, record.question.answer] for a in record.taught]
  if not graded:
    return types.Reward(None, _NO_ANSWER)
  for answer in graded:
    if answer.value is None:
      return types.Reward(None, answer.failure or _NOT_PARSED)
  return types.Reward(_mean([float(a.value) for a in graded]))


_NOT_PARSED = "math-verify cannot parse the reference"
_NO_ANSWER = "the student wrote no answer"


def _exact(record: types.TeachingRecord) -> types.Reward:
  if not record.taught:
    return types.Reward(None, _NO_ANSWER)
  if any(attempt.correct is None for attempt in record.taught):
    raise ValueError(f"Record {record.question.row_id!r} is not graded.")
  return types.Reward(_mean([float(bool(a.correct)) for a in record.taught]))


def _mean(values: Sequence[float]) -> float:
  return sum(values) / len(values)
