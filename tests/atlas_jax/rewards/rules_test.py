# SPDX-License-Identifier: Apache-2.0
"""Tests rule-based rewards."""

import pytest

from atlas_jax import errors, types
from atlas_jax.rewards import grading, rules


def _record(*taught, teaching="Add.", num_tokens=3, finish="stop", answer="42"):
  completion = types.Completion(
    (1,) * num_tokens, (0.0,) * num_tokens, (0.0,) * num_tokens, finish, 0
  )
  return types.TeachingRecord(
    question=types.Question("q", "What is 12 + 30?", answer),
    probe="",
    teacher_rollout=types.Rollout(types.Prompt("q", "", (1,)), completion),
    teaching=teaching,
    num_teaching_tokens=1,
    baseline=(),
    taught=tuple(types.Attempt(text, 5, "stop") for text in taught),
  )


def test_only_a_finished_teaching_is_well_formed():
  rewards = rules.well_formed(
    [_record(), _record(teaching=None), _record(finish="length")]
  )
  assert [reward.value for reward in rewards] == [1.0, 0.0, 0.0]


def test_exact_is_the_fraction_of_correct_answers():
  record = _record("it is 42", "41", "42.0", "no idea")
  assert rules.exact(grading.by_rules().grade([record])) == [types.Reward(0.5)]


def test_exact_requires_graded_answers():
  (reward,) = rules.exact([_record()])
  assert reward.value is None
  with pytest.raises(ValueError, match="not graded"):
    rules.exact([_record("42")])


@pytest.mark.parametrize(
  ("num_tokens", "expected"),
  [(0, 0.0), (60, 0.0), (80, 0.0), (85, -0.25), (90, -0.5), (100, -1.0)],
)
def test_overlong_penalty_grows_up_to_the_limit(num_tokens, expected):
  reward_fn = rules.overlong(soft_fraction=0.2, max_tokens=100)
  (reward,) = reward_fn([_record(num_tokens=num_tokens)])
  assert reward.value == pytest.approx(expected)


@pytest.mark.parametrize("soft_fraction", [0.0, -0.1, 1.1])
def test_overlong_requires_a_valid_soft_fraction(soft_fraction):
  with pytest.raises(errors.ConfigError, match="must be in") as caught:
    rules.overlong(soft_fraction=soft_fraction, max_tokens=100)
  assert "soft_fraction" in caught.value.where


def _open_grader(timeout_s):
  return grading.open_grader(
    timeout_s=timeout_s, num_workers=1, from_first=lambda make: make()
  )


@pytest.fixture(scope="module")
def math_fn():
  with _open_grader(timeout_s=20.0) as grader:
    yield rules.math_verify(grader.verify)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("answer", "taught", "expected"),
  [
    (r"\frac{\sqrt{8}}{2}", r"so \boxed{\sqrt{2}}", 1.0),
    ("42", "The answer is 42.", 1.0),
    ("42", "<solution>6 * 7</solution>", 1.0),
    ("42", "<solution>41</solution>", 0.0),
    ("42", "I do not know.", 0.0),
    (r"12 + 30 = 42, so \boxed{42}", r"\boxed{42.0}", 1.0),
    (r"(x+1)^2", r"\boxed{x^2 + 2x + 1}", 1.0),
  ],
)
def test_math_verify_grades_symbolic_answers(math_fn, answer, taught, expected):
  (reward,) = math_fn([_record(taught, answer=answer)])
  assert reward.value == expected


@pytest.mark.slow
def test_a_reference_that_cannot_be_parsed_is_missing(math_fn):
  unread, read = math_fn([_record("42", answer="?"), _record("42", "41")])
  assert unread.value is None
  assert read.value == 0.5
  (no_answer,) = math_fn([_record()])
  assert no_answer.value is None


@pytest.mark.slow
def test_an_answer_that_takes_too_long_is_missing():
  # sympy would compute all its digits.
  tower = r"\boxed{9^{9^{9^{9}}}}"
  with _open_grader(timeout_s=3.0) as grader:
    hung, right = rules.math_verify(grader.verify)(
      [_record(tower), _record("42")]
    )
  assert hung.value is None
  assert "3 s" in hung.missing_reason
  assert right.value == 1.0
