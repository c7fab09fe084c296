# SPDX-License-Identifier: Apache-2.0
"""Rule-based rewards for format, length and correct answers.

Each is a `types.RewardFn` or returns one. `combine` computes a weighted sum.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import importlib.util

from atlas_jax import errors, types
from atlas_jax.rewards import isolated

_GRADER = "atlas_jax.rewards.math_grader:grade"


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


@contextlib.contextmanager
def open_math(
  *, timeout_s: float, num_workers: int
) -> Iterator[types.RewardFn]:
  """Starts processes that run math-verify, and stops them on exit.

  Yields:
    A reward function that returns the fraction of taught answers that
    math-verify finds equal to the reference. If one answer fails or takes
    longer than `timeout_s`, the record's reward is missing.

  Raises:
    errors.ConfigError: if math-verify is not installed.
  """
  if importlib.util.find_spec("math_verify") is None:
    raise errors.ConfigError(
      "math-verify is not installed.",
      where="--config.reward.weights.math_verify",
      why="This reward compares answers with it.",
      fix="Run pip install -r requirements/trainer.txt, or set the weight to "
      "0.",
    )
  limits = isolated.Limits(timeout_s, max_memory_bytes=0)
  with isolated.Pool(_GRADER, limits, num_workers=num_workers) as pool:

    def verdicts(pairs: Sequence[tuple[str, str]]) -> list[isolated.Answer]:
      return pool.map(pairs)

    yield lambda records: _math(records, verdicts)


def _math(
  records: Sequence[types.TeachingRecord],
  verdicts: Callable[[Sequence[tuple[str, str]]], list[isolated.Answer]],
) -> list[types.Reward]:
  """Grades each distinct pair of answer and reference once."""
  pairs = [
    (attempt.text, record.question.answer)
    for record in records
    for attempt in record.taught
  ]
  distinct = list(dict.fromkeys(pairs))
  found = dict(zip(distinct, verdicts(distinct), strict=True))
  rewards = []
  for record in records:
    graded = [found[a.text, record.question.answer] for a in record.taught]
    failures = [answer.failure for answer in graded if answer.failure]
    if failures or not graded:
      rewards.append(types.Reward(None, (failures or [_NO_ANSWER])[0]))
    else:
      rewards.append(types.Reward(_mean([float(a.value) for a in graded])))
  return rewards


_NO_ANSWER = "the student wrote no answer"


def _exact(record: types.TeachingRecord) -> types.Reward:
  if not record.taught:
    return types.Reward(None, _NO_ANSWER)
  if any(attempt.correct is None for attempt in record.taught):
    raise ValueError(f"Record {record.question.row_id!r} is not graded.")
  return types.Reward(_mean([float(bool(a.correct)) for a in record.taught]))


def _mean(values: Sequence[float]) -> float:
  return sum(values) / len(values)
