# SPDX-License-Identifier: Apache-2.0
"""The adaptive teaching reward: what a teaching changed in the student.

Five presets, R1 to R5, follow the history of the ATLAS rule rewards. With c1
and c0 the credit of a taught and a baseline answer, d = c1 - c0, w the
efficiency weight, m the degradation multiplier and e = 100 / (100 + L):

  R1  d < 0: m d;   else d (1 + w e). Half credit for containing the reference
      or being contained in it. L counts all the teacher wrote.
  R2  R1 with answers either right or wrong.
  R3  R2, and 0.5 (1 + w e) where both are right. L counts the teaching alone.
  R4  R3 with degradation worth 0.
  R5  with h = max(0, 1 - |taught| / |baseline|) in tokens of whole answers:
      improved 1 + h, both right h, degraded -1, both wrong 0.

Each is a pure function of one pair of answers and returns the parts it is the
sum of. A record's reward is the mean over all pairs of its taught and baseline
answers: unbiased when the student is sampled several times, and equal to the
original with one answer of each.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math

from atlas_jax import errors, types
from atlas_jax.rewards import answers, compare

# Teaching tokens at which the efficiency term has halved.
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


def grade(record: types.TeachingRecord) -> types.TeachingRecord:
  """Fills in whether each answer is correct and whether the teaching leaks.

  The reference may be a whole solution; its declared answer then counts. A
  truncated answer is graded like any other.
  """
  reference = _reference(record)

  def graded(attempts: tuple[types.Attempt, ...]) -> tuple[types.Attempt, ...]:
    return tuple(
      dataclasses.replace(
        attempt, correct=_credit(attempt.text, reference, partial=0.0) == 1.0
      )
      for attempt in attempts
    )

  return dataclasses.replace(
    record,
    baseline=graded(record.baseline),
    taught=graded(record.taught),
    leaked=record.teaching is not None
    and answers.leaks(record.teaching, record.question.question, reference),
  )


def r1(
  taught: float,
  baseline: float,
  num_tokens: int,
  *,
  efficiency_weight: float,
  degradation_penalty_multiplier: float,
) -> dict[str, float]:
  """Rewards a change in credit; R2 is this with credits of 0 and 1 only."""
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
  """Rewards as R2 does, and half as much for leaving a right answer right.

  R4 is this with a multiplier of 0.
  """
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
  """Rewards right answers, the more the shorter; knows no weights."""
  if taught < baseline:
    return {"degradation": -1.0}
  if taught == 0.0:
    return {}
  # An empty baseline cannot be shortened.
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
  """Makes the reward function of one preset.

  A teaching that leaks the answer is worth `-leak_penalty`, whatever came of
  it; a completion without a teaching is worth `no_teaching_reward`. `parts` of
  each reward sum to its value.

  Args:
    preset: one of `PRESETS`.
    efficiency_weight: w; None for R5, which has none.
    degradation_penalty_multiplier: m; None for R4 and R5, which have none.
    leak_penalty: what a leak costs, at least 0.
    no_teaching_reward: what a missing teaching is worth.

  Returns:
    A function of graded records. It raises ValueError for ungraded ones.

  Raises:
    ConfigError: for an unknown preset, and for a value that is missing, out of
      range, or would be ignored.
  """
  if preset not in PRESETS:
    raise errors.ConfigError(
      f"Unknown reward preset {preset!r}.",
      where="preset",
      why=f"The presets are {', '.join(PRESETS)}.",
      fix="Choose one of them.",
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
    raise _refused("no_teaching_reward", no_teaching_reward, "is not finite")
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
  """Binds a preset to the fields of a record that it reads."""
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
      if preset != "R1":
        return float(bool(attempt.correct))
      return _credit(attempt.text, _reference(record), partial=0.5)

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
  """Rewards one graded record."""
  attempts = (*record.taught, *record.baseline)
  if record.leaked is None or any(a.correct is None for a in attempts):
    raise ValueError(
      f"Record {record.question.row_id!r} is not graded; pass it through "
      "grade() first."
    )
  if not record.taught or not record.baseline:
    return types.Reward(None, "the student wrote no answer to compare")
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
  """Averages the parts over pairs and sums them."""
  parts = {
    part: sum(pair.get(part, 0.0) for pair in pairs) / len(pairs)
    for part in _PARTS
  }
  return types.Reward(sum(parts.values()), parts=parts)


def _reference(record: types.TeachingRecord) -> str:
  """Returns the final answer out of the reference."""
  answer = record.question.answer
  return answers.declared(answer) or answer


def _credit(text: str, reference: str, *, partial: float) -> float:
  """Returns 1 for the right answer, `partial` for one inside the other."""
  answer = answers.extract(text)
  if answer is None:
    return 0.0
  if compare.equal(answer, reference):
    return 1.0
  a, b = answer.casefold(), reference.casefold()
  return partial if a in b or b in a else 0.0


def _brevity(num_tokens: int) -> float:
  """Returns e: 1 for nothing, one half at a hundred tokens."""
  return _HALF_LENGTH / (_HALF_LENGTH + num_tokens)


def _setting(
  name: str, value: float | None, preset: str, *, read: bool
) -> float:
  """Checks that a weight is given exactly where it is read."""
  if not read:
    if value is not None:
      raise _refused(
        name, value, f"would be ignored by {preset}; set it to None"
      )
    return 0.0
  if value is None:
    raise _refused(name, value, f"is needed by {preset}")
  if not (math.isfinite(value) and value >= 0.0):
    raise _refused(name, value, "must be at least 0")
  return value


def _refused(
  name: str, value: float | None, problem: str
) -> errors.ConfigError:
  return errors.ConfigError(
    f"{name}={value} {problem}.",
    where=name,
    why="R1 to R4 read efficiency_weight, R1 to R3 degradation_penalty_"
    "multiplier; what a preset does not read must be None.",
    fix="Give a number of at least 0 where one is read, else None.",
  )
