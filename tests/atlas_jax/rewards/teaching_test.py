# SPDX-License-Identifier: Apache-2.0
"""Tests the teaching rewards against golden values."""

import dataclasses
import math

import pytest

from atlas_jax import errors, types
from atlas_jax.rewards import grading, teaching

_WEIGHTS = {
  "R1": {"efficiency_weight": 1.0, "degradation_penalty_multiplier": 2.0},
  "R2": {"efficiency_weight": 1.0, "degradation_penalty_multiplier": 2.0},
  "R3": {"efficiency_weight": 1.0, "degradation_penalty_multiplier": 2.0},
  "R4": {"efficiency_weight": 1.0, "degradation_penalty_multiplier": None},
  "R5": {"efficiency_weight": None, "degradation_penalty_multiplier": None},
}
_RIGHT, _WRONG = "<solution>42</solution>", "<solution>41</solution>"
_PART_RIGHT = "<solution>42 or 43</solution>"


def _attempt(text, num_tokens=10):
  return types.Attempt(text, num_tokens, "stop")


def _record(
  taught, baseline, *, num_teaching_tokens=0, num_tokens=0, hint="Add them."
):
  completion = types.Completion(
    (1,) * num_tokens, (0.0,) * num_tokens, (0.0,) * num_tokens, "stop", 0
  )
  return types.TeachingRecord(
    question=types.Question("q", "What is 12 + 30?", "42"),
    probe="add",
    teacher_rollout=types.Rollout(types.Prompt("q", "", ()), completion),
    teaching=hint,
    num_teaching_tokens=num_teaching_tokens,
    baseline=tuple(baseline),
    taught=tuple(taught),
  )


def _grade(record):
  (graded,) = grading.by_rules().grade([record])
  return graded


def _reward(preset, record, **overrides):
  settings = {"leak_penalty": 1.0, "no_teaching_reward": -0.25}
  reward_fn = teaching.build(
    preset, **{**settings, **_WEIGHTS[preset], **overrides}
  )
  (reward,) = reward_fn([_grade(record)])
  return reward


@pytest.mark.parametrize(
  ("preset", "taught", "baseline", "num_tokens", "expected"),
  [
    *((preset, _RIGHT, _WRONG, 100, 1.5) for preset in ("R1", "R2")),
    *((preset, _WRONG, _RIGHT, 100, -2.0) for preset in ("R1", "R2")),
    *((preset, _RIGHT, _RIGHT, 100, 0.0) for preset in ("R1", "R2")),
    ("R1", _PART_RIGHT, _RIGHT, 100, -1.0),
    ("R2", _PART_RIGHT, _RIGHT, 100, -2.0),
    ("R1", _PART_RIGHT, _WRONG, 100, 0.75),
    *((preset, _RIGHT, _WRONG, 0, 2.0) for preset in ("R3", "R4")),
    *((preset, _RIGHT, _WRONG, 100, 1.5) for preset in ("R3", "R4")),
    *((preset, _RIGHT, _WRONG, 900, 1.1) for preset in ("R3", "R4")),
    *((preset, _RIGHT, _RIGHT, 100, 0.75) for preset in ("R3", "R4")),
    *((preset, _RIGHT, _RIGHT, 0, 1.0) for preset in ("R3", "R4")),
    *((preset, _WRONG, _WRONG, 0, 0.0) for preset in ("R3", "R4")),
    ("R3", _WRONG, _RIGHT, 0, -2.0),
    ("R4", _WRONG, _RIGHT, 0, 0.0),
  ],
)
def test_presets_match_golden_values(
  preset, taught, baseline, num_tokens, expected
):
  # R1 and R2 use the length of the completion, R3 and R4 of the teaching; the
  # other length is set to 3, to detect a mix-up.
  whole = preset in ("R1", "R2")
  record = _record(
    [_attempt(taught)],
    [_attempt(baseline)],
    num_teaching_tokens=3 if whole else num_tokens,
    num_tokens=num_tokens if whole else 3,
  )
  assert _reward(preset, record).value == pytest.approx(expected)


@pytest.mark.parametrize(
  ("taught", "baseline", "num_taught", "num_baseline", "expected"),
  [
    (_RIGHT, _WRONG, 4, 10, 1.6),
    (_RIGHT, _RIGHT, 4, 10, 0.6),
    (_RIGHT, _RIGHT, 20, 10, 0.0),
    (_RIGHT, _WRONG, 20, 10, 1.0),
    (_RIGHT, _WRONG, 4, 0, 1.0),
    (_WRONG, _RIGHT, 4, 10, -1.0),
    (_WRONG, _WRONG, 4, 10, 0.0),
  ],
)
def test_r5_matches_golden_values(
  taught, baseline, num_taught, num_baseline, expected
):
  record = _record(
    [_attempt(taught, num_taught)], [_attempt(baseline, num_baseline)]
  )
  assert _reward("R5", record).value == pytest.approx(expected)


def test_the_weights_are_used():
  lost = _record([_attempt(_WRONG)], [_attempt(_RIGHT)])
  won = _record([_attempt(_RIGHT)], [_attempt(_WRONG)])
  kept = _record([_attempt(_RIGHT)], [_attempt(_RIGHT)])
  for preset in ("R1", "R2", "R3"):
    reward = _reward(preset, lost, degradation_penalty_multiplier=3.0)
    assert reward.value == -3.0
  for preset in ("R1", "R2", "R3", "R4"):
    assert _reward(preset, won, efficiency_weight=0.5).value == 1.5
  for preset in ("R3", "R4"):
    assert _reward(preset, kept, efficiency_weight=0.5).value == 0.75


def test_several_answers_are_averaged_over_all_pairs():
  record = _record(
    [_attempt(_RIGHT), _attempt(_RIGHT), _attempt(_WRONG)],
    [_attempt(_WRONG), _attempt(_RIGHT)],
  )
  # Taught/baseline: right/wrong 2.0 twice, right/right 1.0 twice, wrong/right
  # -2.0, wrong/wrong 0.
  reward = _reward("R3", record)
  assert reward.value == pytest.approx((2 * 2.0 + 2 * 1.0 - 2.0) / 6)
  assert reward.parts["degradation"] == pytest.approx(-2.0 / 6)


@pytest.mark.parametrize("preset", teaching.PRESETS)
@pytest.mark.parametrize("hint", ["Add them.", "It makes forty-two.", None])
def test_parts_sum_to_the_value(preset, hint):
  record = _record(
    [_attempt(_RIGHT, 3), _attempt(_WRONG)],
    [_attempt(_WRONG), _attempt(_RIGHT)],
    num_teaching_tokens=50,
    hint=hint,
  )
  reward = _reward(preset, record)
  assert reward.value == pytest.approx(math.fsum(reward.parts.values()))
  assert set(reward.parts) == {
    "correctness",
    "improvement",
    "degradation",
    "efficiency",
    "leak",
    "no_teaching",
  }


@pytest.mark.parametrize("preset", teaching.PRESETS)
def test_a_leak_never_pays(preset):
  record = _record([_attempt(_RIGHT)], [_attempt(_WRONG)], hint="It is 42.")
  reward = _reward(preset, record)
  assert reward.value == reward.parts["leak"] == -1.0


@pytest.mark.parametrize("preset", teaching.PRESETS)
def test_no_teaching_gets_its_reward_regardless_of_answers(preset):
  record = _record([_attempt(_RIGHT)], [_attempt(_WRONG)], hint=None)
  reward = _reward(preset, record)
  assert reward.value == reward.parts["no_teaching"] == -0.25


def test_grade_sets_correct_and_leaked():
  record = _record(
    [_attempt(_RIGHT), types.Attempt(_RIGHT, 5, "length")],
    [_attempt("I do not know.")],
    hint="Say 42.",
  )
  graded = _grade(record)
  assert [a.correct for a in graded.taught] == [True, True]
  assert [a.correct for a in graded.baseline] == [False]
  assert graded.leaked is True
  assert _grade(_record([], [], hint=None)).leaked is False


def test_the_answer_is_extracted_from_a_solution():
  record = _record([_attempt(_RIGHT)], [_attempt(_WRONG)])
  question = dataclasses.replace(
    record.question, answer="12 + 30 = 42, so #### 42"
  )
  graded = _grade(dataclasses.replace(record, question=question))
  assert graded.taught[0].correct
  assert not graded.baseline[0].correct


def test_the_reward_without_an_answer_is_missing_not_zero():
  reward = _reward("R4", _record([], [_attempt(_RIGHT)]))
  assert reward.value is None
  assert reward.missing_reason


def test_ungraded_records_are_rejected():
  reward_fn = teaching.build(
    "R5", leak_penalty=1.0, no_teaching_reward=0.0, **_WEIGHTS["R5"]
  )
  with pytest.raises(ValueError, match="not graded"):
    reward_fn([_record([_attempt(_RIGHT)], [_attempt(_RIGHT)])])


@pytest.mark.parametrize(
  ("preset", "overrides", "message"),
  [
    ("R6", {}, "R1, R2, R3, R4, R5"),
    ("R4", {"degradation_penalty_multiplier": 2.0}, "must be None"),
    ("R5", {"degradation_penalty_multiplier": 2.0}, "must be None"),
    ("R5", {"efficiency_weight": 1.0}, "must be None"),
    ("R3", {"degradation_penalty_multiplier": None}, "must be set"),
    ("R4", {"efficiency_weight": None}, "must be set"),
    ("R4", {"efficiency_weight": math.nan}, "must be finite"),
    ("R4", {"leak_penalty": -1.0}, "must be finite and >= 0"),
    ("R4", {"no_teaching_reward": math.inf}, "finite"),
  ],
)
def test_invalid_settings_are_rejected(preset, overrides, message):
  weights = _WEIGHTS.get(preset, _WEIGHTS["R4"])
  with pytest.raises(errors.ConfigError, match=message):
    teaching.build(
      preset,
      **{
        "leak_penalty": 1.0,
        "no_teaching_reward": 0.0,
        **weights,
        **overrides,
      },
    )
