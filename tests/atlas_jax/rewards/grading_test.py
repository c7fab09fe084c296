# SPDX-License-Identifier: Apache-2.0
"""Tests the grader against labelled answers, and its use of math-verify."""

import dataclasses
import json
import pathlib

import pytest

from atlas_jax import types
from atlas_jax.rewards import grading, isolated, rules

_GOLDEN = pathlib.Path(__file__).parents[2] / "golden/grading.jsonl"
_MIN_RATE = 0.995


def _open_grader(timeout_s=20.0):
  return grading.open_grader(
    timeout_s=timeout_s, num_workers=2, from_first=lambda make: make()
  )


def _fake(verify):
  """Returns a grader that asks `verify`, and the pairs it asked about."""
  asked = []

  def counted(pairs):
    asked.extend(pairs)
    return [verify(*pair) for pair in pairs]

  return grading.Grader(counted, lambda make: make()), asked


def _record(*taught, answer, question="What is it?", baseline=()):
  completion = types.Completion((1,), (0.0,), (0.0,), "stop", 0)
  return types.TeachingRecord(
    question=types.Question("q", question, answer),
    probe="",
    teacher_rollout=types.Rollout(types.Prompt("q", "", (1,)), completion),
    teaching="Think.",
    num_teaching_tokens=1,
    baseline=tuple(types.Attempt(text, 5, "stop") for text in baseline),
    taught=tuple(types.Attempt(text, 5, "stop") for text in taught),
  )


def _rates(rows, found):
  """Returns precision and recall."""
  both = sum(
    row["equal"] and equal for row, equal in zip(rows, found, strict=True)
  )
  return both / sum(found), both / sum(row["equal"] for row in rows)


@pytest.mark.slow
def test_labelled_answers_are_graded_with_high_precision_and_recall():
  pytest.importorskip("math_verify")
  rows = [json.loads(line) for line in _GOLDEN.read_text().splitlines()]
  pairs = [(row["answer"], row["reference"]) for row in rows]
  assert len(set(pairs)) == len(rows) >= 400
  by_rules = grading.by_rules().equal(pairs)
  with _open_grader() as grader:
    found = grader.equal(pairs)
  for name, equal in (("rules", by_rules), ("rules and math-verify", found)):
    precision, recall = _rates(rows, equal)
    print(name, f"precision {precision:.4f}, recall {recall:.4f}")  # noqa: T201
  wrong = [r for r, e in zip(rows, found, strict=True) if r["equal"] != e]
  precision, recall = _rates(rows, found)
  assert precision >= _MIN_RATE, wrong
  assert recall >= _MIN_RATE, wrong
  assert _rates(rows, by_rules)[0] >= _MIN_RATE


def test_math_verify_is_asked_once_about_expressions_only():
  grader, asked = _fake(lambda *_: isolated.Answer(True))
  pairs = [
    ("x+1", "1+x"),
    ("x+1", "1+x"),
    ("3", "4"),
    ("a long explanation", "x+1"),
    ("Paris", "London"),
    ("50%", "x"),
  ]
  expected = [True, True, False, False, False, False]
  assert grader.equal(pairs) == expected
  assert grader.equal(pairs) == expected
  assert asked == [("x+1", "1+x")]


def test_a_failure_counts_as_wrong_and_is_counted_once():
  grader, _ = _fake(lambda *_: isolated.Answer(failure="took too long"))
  assert grader.equal([("x+1", "1+x"), ("y", "2y"), ("2", "2")]) == [
    False,
    False,
    True,
  ]
  assert grader.take_num_failures() == 2
  assert grader.equal([("x+1", "1+x")]) == [False]
  assert grader.take_num_failures() == 0


def test_without_math_verify_rules_decide(monkeypatch):
  monkeypatch.setattr(grading.importlib.util, "find_spec", lambda _: None)
  with _open_grader() as grader:
    assert grader.verify is None
    assert grader.equal([("x+1", "1+x"), ("1/2", "0.5")]) == [False, True]


def test_the_first_process_decides():
  grader = grading.Grader(lambda _: pytest.fail("asked"), lambda _: [True])
  assert grader.equal([("x+1", "1+x")]) == [True]


@pytest.mark.slow
def test_records_are_graded_and_a_timeout_is_not_an_error():
  pytest.importorskip("math_verify")
  record = _record(
    r"so \boxed{1+x}",
    r"\boxed{9^{9^{9^{9}}}}",
    "no idea",
    answer="#### x + 1",
    baseline=[r"\boxed{x-1}"],
  )
  with _open_grader(timeout_s=3.0) as grader:
    (graded,) = grader.grade([record])
    assert [a.correct for a in graded.taught] == [True, False, False]
    assert [a.correct for a in graded.baseline] == [False]
    assert grader.take_num_failures() == 1
  (reward,) = rules.exact([graded])
  assert reward.value == pytest.approx(1 / 3)


@pytest.mark.parametrize(
  ("question", "answer", "taught", "correct"),
  [
    ("What percentage is left?", "60", "It is 60%.", True),
    ("What percent is left?", "60", "It is 60.", True),
    ("How many are left?", "60", "It is 60%.", False),
    ("What percentage is left?", "0.5", "It is 0.5%.", False),
    ("What percentage is left?", "60%", "It is 61%.", False),
  ],
)
def test_the_question_may_ask_for_a_percentage(
  question, answer, taught, correct
):
  record = _record(taught, answer=answer, question=question)
  (graded,) = grading.by_rules().grade([record])
  assert graded == dataclasses.replace(
    record,
    taught=(
      dataclasses.replace(
        record.taught[0], correct=correct, answer=taught.split()[-1][:-1]
      ),
    ),
    leaked=False,
  )


def test_paraphrases_are_graded_against_their_own_answer():
  record = _record("12", answer="12")
  (attempt,) = record.taught
  other = dataclasses.replace(attempt, text="15")
  for answer, correct in (("15", [False, True]), ("", [True, False])):
    question = dataclasses.replace(
      record.question, paraphrase="And then?", paraphrase_answer=answer
    )
    (graded,) = grading.by_rules().grade(
      [
        dataclasses.replace(
          record, question=question, paraphrased=(attempt, other)
        )
      ]
    )
    assert [a.correct for a in graded.paraphrased] == correct
    assert graded.taught[0].correct


@pytest.mark.parametrize(
  ("text", "finish_reason", "correct"),
  [
    ("First 30, then 42", "stop", True),
    ("First 30, then 42", "length", False),
    ("The answer is 42. Let me check", "length", True),
    ("", "length", False),
  ],
)
def test_a_truncated_answer_must_be_declared(text, finish_reason, correct):
  record = _record(text, answer="42")
  attempt = dataclasses.replace(record.taught[0], finish_reason=finish_reason)
  record = dataclasses.replace(record, taught=(attempt,))
  (graded,) = grading.by_rules().grade([record])
  assert graded.taught[0].correct == correct


def test_answers_that_are_graded_already_are_kept():
  record = _record("The answer is 42.", answer="42")
  kept = types.Attempt("", 5, "stop", correct=False, answer="41")
  record = dataclasses.replace(record, baseline=(kept,))
  (graded,) = grading.by_rules().grade([record])
  assert graded.baseline == (kept,)
  assert graded.taught[0].correct
