# SPDX-License-Identifier: Apache-2.0
"""Tests answers to paraphrases with the teaching of the question."""

import re

import pytest

from atlas_jax import types
from atlas_jax.evaluation import metrics, sampling
from atlas_jax.rewards import grading
from atlas_jax.teaching import (
  missing,
  protocol,
  roles,
  single_model,
  templates,
)
from tests import fakes

_QUESTIONS = [
  types.Question(
    f"q{i}",
    f"What is {i} + 10?",
    str(i + 10),
    paraphrase=f"What is {i} + 20?" if i else "",
    paraphrase_answer=str(i + 20) if i else "",
  )
  for i in range(3)
]
_PARAMS = types.SamplingParams(1, 64, 1.0, 1.0, 0, seed=0)


def _answer(prompt, params, index):
  """Copies a revealed answer, adds if advised to, else gives up."""
  del params, index
  asked, advice = re.search(r"user\n(.*\?)(.*)", prompt.text).groups()
  if revealed := re.search(r"is (\d+)\.", advice):
    return f"The answer is {revealed[1]}."
  numbers = map(int, re.findall(r"\d+", asked))
  return f"The answer is {sum(numbers) if 'Add' in advice else 0}."


@pytest.fixture
def role(tmp_path):
  tokenizer = fakes.write_tokenizer(tmp_path)
  return roles.Role(fakes.FakeSampler(tokenizer, _answer), tokenizer)


def _protocol(student, teaching, **params):
  policy = fakes.FakeSampler(student.tokenizer, lambda *args: teaching(*args))
  params = {
    f"{name}_params": params.get(name, _PARAMS)
    for name in ("probe", "teach", "solve", "baseline")
  }
  return protocol.Protocol(
    roles.Role(policy, student.tokenizer),
    student,
    templates.Templates(
      "{question}", "{question}{probe}", "{question} {teaching}", "{question}"
    ),
    **params,
  )


def _reveals(prompt, params, index):
  del params, index
  return f"<teaching>It is {int(prompt.row_id[1]) + 10}.</teaching>"


def _advises(prompt, params, index):
  del prompt, params, index
  return "<teaching>Add them.</teaching>"


@pytest.mark.parametrize(
  ("teaching", "echo_proof"), [(_reveals, 0.0), (_advises, 1.0)]
)
def test_a_copied_answer_is_wrong_on_the_paraphrase(role, teaching, echo_proof):
  records = sampling.sample(_protocol(role, teaching), _QUESTIONS, seed=1)
  graded = grading.by_rules().grade(records)
  summary = metrics.summarize(graded, num_bootstrap=0, seed=0)
  assert summary["teaching/accuracy"] == 1.0
  assert summary["teaching/num_paraphrases"] == 2
  assert summary["teaching/echo_proof_accuracy"] == echo_proof


def test_each_teaching_is_used_for_the_paraphrase_as_for_the_question(role):
  def teach(prompt, params, index):
    del prompt, params
    return f"<teaching>Hint {index}.</teaching>" if index < 2 else "No tag."

  two, three = (
    types.SamplingParams(size, 64, 1.0, 1.0, 0, seed=0) for size in (2, 3)
  )
  made = _protocol(role, teach, teach=three, solve=two)
  records = sampling.sample(made, _QUESTIONS, seed=1)
  assert [len(r.paraphrased) for r in records] == [0] * 3 + [2] * 6
  prompts, params = role.sampler.calls[-1]
  assert (params.group_size, params.seed) == (2, 1)
  assert [p.row_id for p in prompts] == [
    f"q{i}/paraphrase/{j}" for i in (1, 2) for j in range(3)
  ]
  asked = [re.search(r"user\n(.*)<\|im_end", p.text)[1] for p in prompts[:3]]
  question = _QUESTIONS[1].paraphrase
  assert asked == [f"{question} Hint 0.", f"{question} Hint 1.", question]


def test_questions_without_a_paraphrase_take_no_further_call(role):
  plain = _protocol(role, _advises).run(_QUESTIONS[:1], 1)
  num_calls = len(role.sampler.calls)
  (record,) = sampling.sample(_protocol(role, _advises), _QUESTIONS[:1], 1)
  assert len(role.sampler.calls) == 2 * num_calls
  assert record.taught == plain[0].taught
  assert record.paraphrased == ()


def test_a_record_whose_paraphrase_was_dropped_counts_as_missing(role):
  role.sampler.given_up = {"q1/paraphrase/0"}
  records = sampling.sample(_protocol(role, _advises), _QUESTIONS, seed=1)
  assert [bool(r.taught) for r in records] == [True, False, True]
  assert [len(r.paraphrased) for r in records] == [0, 0, 1]
  assert missing.fraction(_QUESTIONS, records, max_fraction=0.5) == 1 / 3


def test_taught_and_baseline_answers_have_different_random_numbers(role):
  with pytest.raises(ValueError, match="must differ"):
    sampling.sample(_protocol(role, _advises), _QUESTIONS, seed=0)


def test_a_model_without_a_student_answers_no_paraphrase(role):
  rollouts = single_model.SingleModelRollouts(
    role, "{question}", answer_params=_PARAMS
  )
  records = sampling.sample(rollouts, _QUESTIONS, seed=0)
  assert len(records) == 3
  assert len(role.sampler.calls) == 1
