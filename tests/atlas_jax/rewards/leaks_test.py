# SPDX-License-Identifier: Apache-2.0
"""Tests the detection of leaks, on labelled rows and by rule."""

import json
import pathlib
import time

import pytest

from atlas_jax.data import word_problems
from atlas_jax.rewards import leaks

_GOLDEN = pathlib.Path(__file__).parents[3] / "tests/golden/leaks.jsonl"
# Measured in tests/golden/leaks.md; raise them with the detector.
_MIN_PRECISION, _MIN_RECALL = 0.98, 0.95

_SUM = "How many are 5 and 7?"
_CHOICE = "Which is even? (A) 7 (B) 12 (C) 15"


@pytest.fixture(scope="module")
def rows():
  lines = _GOLDEN.read_text(encoding="utf-8").splitlines()
  return [json.loads(line) for line in lines]


def test_labelled_rows_are_distinct_and_balanced(rows):
  assert len(rows) >= 300
  assert len({(row["question"], row["teaching"]) for row in rows}) == len(rows)
  assert 0.4 < sum(row["leaks"] for row in rows) / len(rows) < 0.6
  assert all(row["why"] for row in rows)


def test_precision_and_recall_on_labelled_rows(rows):
  hits, false_alarms, misses = [], [], []
  for row in rows:
    found = leaks.reveals_answer(
      row["teaching"], row["question"], row["answer"]
    )
    if found:
      (hits if row["leaks"] else false_alarms).append(row)
    elif row["leaks"]:
      misses.append(row)
  precision = len(hits) / (len(hits) + len(false_alarms))
  recall = len(hits) / (len(hits) + len(misses))
  assert precision >= _MIN_PRECISION, (precision, false_alarms)
  assert recall >= _MIN_RECALL, (recall, misses)


@pytest.mark.parametrize(
  ("teaching", "answer"),
  [
    ("You should get 1,500.", "1500"),
    ("It is twelve of them.", "12"),
    ("twenty-one, I think", "21"),
    ("5+7=12", "12"),
    ("add to x=12 apples", "12"),
    ("that makes 12.0", "12"),
    ("that makes 24/2", "12"),
    ("so compute 6+6", "12"),
    ("It is a dozen.", "12"),
    ("it is 0.5", "1/2"),
    (r"it is \frac{1}{2}", "0.5"),
    ("go for 50 percent", "50%"),
    ("the value 50", "50%"),
    ("think of paris, the capital", "Paris"),
    ("choose B", "B"),
  ],
)
def test_an_answer_that_is_not_in_the_question_leaks(teaching, answer):
  assert leaks.reveals_answer(teaching, _SUM, answer)


@pytest.mark.parametrize(
  ("teaching", "answer"),
  [
    ("1. Name the unknown. 2. Write one equation. 3. Solve it.", "3"),
    ("a triangle has 3 sides", "3"),
    ("Use all 112 of them.", "12"),
    ("Use 12.5 and 3.12 and 1,200.", "12"),
    ("Add 5 and 7.", "12"),
    ("See section 3.1.42.", "2"),
    ("Note the parisian style.", "Paris"),
    ("Take a look.", "A"),
    ("Add the two numbers.", ""),
    ("seen 10,11,12", "12 apples"),
  ],
)
def test_incidental_words_and_numbers_do_not_leak(teaching, answer):
  assert not leaks.reveals_answer(teaching, _SUM, answer)


@pytest.mark.parametrize(
  ("teaching", "leaked"),
  [
    ("Compare 12 with 9 first.", False),
    ("Start from twelve.", False),
    ("The answer is 12.", True),
    ("The Answer: **12**", True),
    ("The larger one is twelve.", True),
    ("3 * 4 = $12", True),
    (r"\boxed{12}", True),
    ("<solution> 12", True),
  ],
)
def test_an_answer_in_the_question_leaks_only_if_announced(teaching, leaked):
  question = "Which is larger, 12 or 9?"
  assert leaks.reveals_answer(teaching, question, "12") == leaked


@pytest.mark.parametrize("answer", ["B", "(B)", "12", "(B) 12"])
@pytest.mark.parametrize("teaching", ["Choose (B).", "The answer is 12."])
def test_a_choice_leaks_by_its_letter_and_its_text(teaching, answer):
  assert leaks.reveals_answer(teaching, _CHOICE, answer)
  assert not leaks.reveals_answer("Compare (A) and (B).", _CHOICE, answer)


def test_only_hints_that_state_the_result_leak_in_word_problems():
  problems = word_problems.problems(300, seed=3, excluded=set())
  for problem in problems:
    for hint in ("Add the numbers.", "First multiply, then subtract."):
      assert not leaks.reveals_answer(hint, problem.text, problem.answer)
    hint = f"The answer is {problem.answer}."
    assert leaks.reveals_answer(hint, problem.text, problem.answer)


@pytest.mark.parametrize(
  "teaching",
  [
    "(" * 5000 + "1" + ")" * 5000,
    "1+" * 5000 + "1",
    "((9^64)^64)^64",
    "1" * 6000,
    "is " * 20_000 + "1",
    "\n" * 20_000,
    "1. " * 5000,
    "1/0",
  ],
  ids=lambda text: text[:6].strip(),
)
def test_degenerate_texts_are_read_quickly(teaching):
  start = time.monotonic()
  leaks.reveals_answer(teaching, _SUM, "12")
  leaks.reveals_answer("Add 5 and 7.", teaching, "12")
  assert time.monotonic() - start < 10.0
