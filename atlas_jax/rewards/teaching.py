# SPDX-License-Identifier: Apache-2.0
"""The adaptive teaching reward: how a teaching changes the student's answers.

The presets R1 to R5 are successive versions of the ATLAS rule rewards. Let c1
and c0 be the credit of a taught and a baseline answer, d = c1 - c0, w the
efficiency weight, m the degradation multiplier, e = 100 / (100 + L) and L a
number of tokens:

  R1  d < 0: m d;   else d (1 + w e). Half credit if the answer contains the
      reference or is contained in it. L is the length of the completion.
  R2  R1 with a credit of either 0 or 1.
  R3  R2, and 0.5 (1 + w e) if both are correct. L is the length of the
      teaching.
  R4  R3 with a degradation of 0.
  R5  with h = max(0, 1 - |taught| / |baseline|) in tokens of whole answers:
      improved 1 + h, both correct h, degraded -1, both wrong 0.

Each is a pure function of one pair of answers that returns the terms of the
sum. A record's reward is the mean over all pairs of its taught and baseline
answers: unbiased if the student is sampled several times, and equal to the
original with one answer of each.
"""

from collections.abc import Callable, Sequence
import functools
import math

from atlas_jax import errors, types
from atlas_jax.rewards import answers

# Number of tokens at which the efficiency term is one half.
_HALF_LENGTH = 100.0

_PARTS = (
  "correctness",
  "improvement",
  "degradation",
  "efficiency",
  "leak",
  "no_teaching",
)

PRESETS = ("R1", "R2", "R3", "R4", "R5")

_Pair = Callable[
  [types.TeachingRecord, types.Attempt, types.Attempt], dict[str, float]
]


def r1(
  taught: float,
  baseline: float,
  num_tokens: int,
  *,
  efficiency_weight: float,
  degradation_penalty_multiplier: float,
) -> dict[str, float]:
  """Returns the parts of R1, or of R2 for credits of 0 or 1."""
  change = taught - baseline
  if change < 0:
    return {"degradation": degradation_penalty_multiplier * change}
  return {
    "improvement": change,
    "efficiency": change * efficiency_weight * _brevity(num_tokens),
  }


def r3(
  taught: float,
  baseline: float,
  num_tokens: int,
  *,
  efficiency_weight: float,
  degradation_penalty_multiplier: float,
) -> dict[str, float]:
  """Returns the parts of R3, or of R4 for a multiplier of 0."""
  if taught == baseline == 1.0:
    return {
      "correctness": 0.5,
      "efficiency": 0.5 * efficiency_weight * _brevity(num_tokens),
    }
  return r1(
    taught,
    baseline,
    num_tokens,
    efficiency_weight=efficiency_weight,
    degradation_penalty_multiplier=degradation_penalty_multiplier,
  )


def r5(
  taught: float,
  baseline: float,
  *,
  num_taught_tokens: int,
  num_baseline_tokens: int,
) -> dict[str, float]:
  """Returns the parts of R5, which has no weights."""
  if taught < baseline:
    return {"degradation": -1.0}
  if taught == 0.0:
    return {}
  # max(): an empty baseline cannot be shortened.
  saved = 1.0 - num_taught_tokens / max(num_baseline_tokens, 1)
  return {"improvement": taught - baseline, "efficiency": max(0.0, saved)}


def build(
  preset: str,
  *,
  efficiency_weight: float | None,
  degradation_penalty_multiplier: float | None,
  leak_penalty: float,
  no_teaching_reward: float,
) -> types.RewardFn:
  """Returns the reward function of one preset.

  A teaching that leaks the answer gets `-leak_penalty`, regardless of the
  results; a completion without a teaching gets `no_teaching_reward`. The
  `parts` of each reward sum to its value.

  Args:
    preset: one of `PRESETS`.
    efficiency_weight: w; must be None for R5.
    degradation_penalty_multiplier: m; must be None for R4 and R5.
    leak_penalty: penalty of a leak, >= 0.
    no_teaching_reward: reward of a completion without a teaching.

  Returns:
    A function of graded records. It raises ValueError for ungraded ones.

  Raises:
    ConfigError: if the preset is unknown, or a value is missing, out of range,
      or not used by the preset.
  """
  if preset not in PRESETS:
    raise errors.ConfigError(
      f"preset must be one of {', '.join(PRESETS)}, got {preset!r}.",
      where="preset",
      why="Each preset is one version of the teaching reward.",
      fix="Choose a preset from the list.",
    )
  w = _setting(
    "efficiency_weight", efficiency_weight, preset, read=preset != "R5"
  )
  m = _setting(
    "degradation_penalty_multiplier",
    degradation_penalty_multiplier,
    preset,
    read=preset in ("R1", "R2", "R3"),
  )
  _setting("leak_penalty", leak_penalty, preset, read=True)
  if not math.isfinite(no_teaching_reward):
    raise _invalid("no_teaching_reward", no_teaching_reward, "must be finite")
  pair = _pair_fn(preset, w, m)

  def reward_fn(
    records: Sequence[types.TeachingRecord],
  ) -> list[types.Reward]:
    return [
      _reward(record, pair, leak_penalty, no_teaching_reward)
      for record in records
    ]

  return reward_fn


def _pair_fn(preset: str, w: float, m: float) -> _Pair:
  """Returns a preset's function of a record and one pair of its answers."""
  if preset == "R5":
    return lambda _, taught, baseline: r5(
      float(bool(taught.correct)),
      float(bool(baseline.correct)),
      num_taught_tokens=taught.num_tokens,
      num_baseline_tokens=baseline.num_tokens,
    )
  formula = functools.partial(
    r1 if preset in ("R1", "R2") else r3,
    efficiency_weight=w,
    degradation_penalty_multiplier=m,
  )

  def pair(
    record: types.TeachingRecord, taught: types.Attempt, baseline: types.Attempt
  ) -> dict[str, float]:
    def credit(attempt: types.Attempt) -> float:
      if preset == "R1" and not attempt.correct:
        return _partial_credit(record, attempt)
      return float(bool(attempt.correct))

    if preset in ("R1", "R2"):
      num_tokens = len(record.teacher_rollout.completion.token_ids)
    else:
      num_tokens = record.num_teaching_tokens
    return formula(credit(taught), credit(baseline), num_tokens)

  return pair


def _reward(
  record: types.TeachingRecord,
  pair: _Pair,
  leak_penalty: float,
  no_teaching_reward: float,
) -> types.Reward:
  """Computes the reward of one graded record."""
  attempts = (*record.taught, *record.baseline)
  if record.leaked is None or any(a.correct is None for a in attempts):
    raise ValueError(
      f"Record {record.question.row_id!r} is not graded; pass it through "
      "grade() first."
    )
  if not record.taught or not record.baseline:
    return types.Reward(None, "no student answer to compare")
  if record.teaching is None:
    return _total([{"no_teaching": no_teaching_reward}])
  if record.leaked:
    return _total([{"leak": -leak_penalty}])
  return _total(
    [
      pair(record, taught, baseline)
      for taught in record.taught
      for baseline in record.baseline
    ]
  )


def _total(pairs: Sequence[dict[str, float]]) -> types.Reward:
  """Averages each part over pairs; the value is the sum of the parts."""
  parts = {
    part: sum(pair.get(part, 0.0) for pair in pairs) / len(pairs)
    for part in _PARTS
  }
  return types.Reward(sum(parts.values()), parts=parts)


def _partial_credit(
  record: types.TeachingRecord, attempt: types.Attempt
) -> float:
  """Returns 0.5 if one of answer and reference contains the other, else 0."""
  if attempt.answer is None:
    return 0.0
  a, b = (
    attempt.answer.casefold(),
    answers.of_reference(record.question.answer).casefold(),
  )
  return 0.5 if a in b or b in a else 0.0


def _brevity(num_tokens: int) -> float:
  """Returns e = 100 / (100 + num_tokens)."""
  return _HALF_LENGTH / (_HALF_LENGTH + num_tokens)


def _setting(
  name: str, value: float | None, preset: str, *, read: bool
) -> float:
  """Validates a weight: a number if the preset reads it, else None."""
  if not read:
    if value is not None:
      raise _invalid(name, value, f"must be None for {preset}")
    return 0.0
  if value is None:
    raise _invalid(name, value, f"must be set for {preset}")
  if not (math.isfinite(value) and value >= 0.0):
    raise _invalid(name, value, "must be finite and >= 0")
  return value


def _invalid(name: str, value: float | None, rule: str) -> errors.ConfigError:
  return errors.ConfigError(
    f"{name} {rule}, got {value}.",
    where=name,
    why="R1 to R4 read efficiency_weight, R1 to R3 degradation_penalty_"
    "multiplier; a value that a preset does not read must be None.",
    fix="Set it to a number that meets the rule, or to None if the preset does "
    "not read it.",
  )
