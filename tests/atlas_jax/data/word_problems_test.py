# SPDX-License-Identifier: Apache-2.0
"""Synthetic word problems, and a student who acts as described."""

import hashlib
import re

import numpy as np
import pytest

from atlas_jax.data import word_problems
from atlas_jax.rewards import answers, compare, leaks
from atlas_jax.teaching import templates

_METHOD = re.compile(r"\b(add|subtract|multiply|divide)\b", re.IGNORECASE)


@pytest.fixture(scope="module")
def problems():
  return word_problems.problems(600, seed=3, excluded=set())


@pytest.fixture(scope="module")
def student(problems):
  return list(word_problems.student_rows(problems, seed=4))


@pytest.fixture(scope="module")
def teacher(problems):
  return list(word_problems.teacher_rows(problems, seed=5))


def _named(text):
  """Returns the operations that a text names, in order."""
  return tuple(name.lower() for name in _METHOD.findall(text))


def _solves(reply, problem):
  answer = answers.extract(reply)
  return answer is not None and compare.equal(answer, problem.answer)


def _by_text(problems):
  return {problem.text: problem for problem in problems}


def test_generation_depends_only_on_the_seed(problems, student, teacher):
  again = word_problems.problems(600, seed=3, excluded=set())
  assert again == problems
  assert list(word_problems.student_rows(again, seed=4)) == student
  assert list(word_problems.teacher_rows(again, seed=5)) == teacher

  assert word_problems.problems(600, seed=4, excluded=set()) != problems
  assert list(word_problems.student_rows(again, seed=6)) != student
  assert list(word_problems.teacher_rows(again, seed=6)) != teacher


def test_problems_of_a_seed_are_those_of_earlier_versions(problems):
  # Results name a seed, so its problems must not change.
  text = "\n".join(f"{p.row_id} {p.text} {p.answer}" for p in problems)
  assert hashlib.sha256(text.encode()).hexdigest()[:16] == "652b763dd380955b"


def test_paraphrases_have_other_numbers_and_another_answer(problems):
  texts = {problem.text for problem in problems}
  others = word_problems.paraphrases(problems, seed=3, excluded=texts)
  assert others == word_problems.paraphrases(problems, seed=3, excluded=texts)
  assert not texts & {other.text for other in others}
  for problem, other in zip(problems, others, strict=True):
    assert re.sub(r"\d+", "", other.text) == re.sub(r"\d+", "", problem.text)
    assert other.method == problem.method
    assert other.answer != problem.answer
    question = problem.question(other)
    assert question.rephrased() == other.question()
    assert question.question == problem.text


def test_problems_are_distinct_and_none_is_excluded(problems):
  texts = {problem.text for problem in problems}
  others = word_problems.problems(300, seed=3, excluded=texts)

  assert len(texts) == 600
  assert len({problem.row_id for problem in problems}) == 600
  assert not texts & {problem.text for problem in others}


def test_every_difficulty_has_every_method(problems):
  found = {(p.difficulty, p.method) for p in problems}
  methods = {p.method for p in problems}
  assert found == {
    (d, method) for d in word_problems.DIFFICULTIES for method in methods
  }


def test_answers_are_integers_that_the_text_does_not_contain(problems):
  for problem in problems:
    assert problem.answer.isdigit()
    assert int(problem.answer) > 0
    assert all(str(number) in problem.text for number in problem.numbers)
  # Otherwise a student could copy the answer.
  given = [str(p.answer) in re.findall(r"\d+", p.text) for p in problems]
  assert np.mean(given) < 0.2


def test_question_has_the_public_fields_of_its_problem(problems):
  for problem in problems[:20]:
    question = problem.question()
    assert (question.row_id, question.question) == (
      problem.row_id,
      problem.text,
    )
    assert question.answer == problem.answer
    assert question.difficulty == problem.difficulty


def test_student_without_help_fails_hard_wordings(problems, student):
  by_text = _by_text(problems)
  right = {name: [] for name in word_problems.DIFFICULTIES}
  for row in student:
    if row["kind"] == "baseline":
      problem = by_text[row["question"]]
      right[problem.difficulty].append(_solves(row["reply"], problem))
  easy, medium, hard = (np.mean(right[n]) for n in word_problems.DIFFICULTIES)
  assert easy > 0.9 > medium + 0.2
  assert medium > hard + 0.2


def test_students_plan_names_only_a_method(problems, student):
  by_text = _by_text(problems)
  for row in student:
    if row["kind"] == "probe":
      assert len(_named(row["reply"])) == len(by_text[row["question"]].method)
      assert not re.search(r"\d", row["reply"])


def test_student_follows_hints(problems, student):
  by_text = _by_text(problems)
  outcomes = {True: [], False: []}
  for row in student:
    problem = by_text[row["question"]]
    if row["kind"] == "taught" and _named(row["hint"]):
      is_right = _named(row["hint"]) == problem.method
      outcomes[is_right].append(_solves(row["reply"], problem))
  # A wrong method may have the right result by chance.
  assert all(outcomes[True])
  assert np.mean(outcomes[False]) < 0.1
  assert min(map(len, outcomes.values())) > 100


def test_every_row_has_its_texts(student, teacher):
  assert {row["kind"] for row in student} == {"probe", "baseline", "taught"}
  for row in student:
    assert bool(row["hint"]) == (row["kind"] == "taught")
    assert row["reply"]
  assert all(row["probe"] and row["reply"] for row in teacher)


def test_guidance_is_of_mixed_quality_and_worst_for_hard_problems(
  problems, teacher
):
  right = {name: [] for name in word_problems.DIFFICULTIES}
  num_leaks, num_untagged = 0, 0
  for problem, row in zip(problems, teacher, strict=True):
    assert row["question"] == problem.text
    teaching = templates.extract_teaching(row["reply"])
    if teaching is None:
      num_untagged += 1
    else:
      right[problem.difficulty].append(_named(teaching) == problem.method)
      num_leaks += leaks.reveals_answer(teaching, problem.text, problem.answer)
  easy, _, hard = (np.mean(right[name]) for name in word_problems.DIFFICULTIES)
  # Reinforcement learning needs some good guidance and some bad.
  assert 0.9 > easy > hard > 0.1
  assert 0 < num_leaks < 0.15 * len(teacher)
  assert 0 < num_untagged < 0.1 * len(teacher)
