# SPDX-License-Identifier: Apache-2.0
"""Tests rollouts of a policy without a student."""

import dataclasses

from atlas_jax import types
from atlas_jax.evaluation import metrics
from atlas_jax.rewards import grading, rules
from atlas_jax.teaching import roles, single_model
from tests import fakes

_QUESTIONS = [
  types.Question("a", "1 + 1 {question}?", "2"),
  types.Question("b", "2 + 2?", "4"),
]
_PARAMS = types.SamplingParams(
  group_size=3,
  max_completion_tokens=50,
  temperature=1.0,
  top_p=1.0,
  top_k=0,
  seed=9,
)


def _run(tmp_path, write):
  tokenizer = fakes.write_tokenizer(tmp_path)
  sampler = fakes.FakeSampler(tokenizer, write)
  asked = single_model.SingleModelRollouts(
    roles.Role(sampler, tokenizer), "Q {question}", answer_params=_PARAMS
  )
  return sampler, asked.run(_QUESTIONS, seed=4)


def test_the_policys_completion_is_the_answer(tmp_path):
  sampler, records = _run(
    tmp_path, lambda prompt, params, i: f"{prompt.row_id} {params.seed} {i}"
  )

  ((prompts, params),) = sampler.calls
  assert params == dataclasses.replace(_PARAMS, seed=4)
  assert "Q 1 + 1 {question}?<|im_end|>" in prompts[0].text
  assert [r.question.row_id for r in records] == ["a"] * 3 + ["b"] * 3
  for i, record in enumerate(records):
    answer = f"{record.question.row_id}/answer 4 {i % 3}"
    assert record.taught[0].text == record.completion_text == answer
    completion = record.teacher_rollout.completion
    assert record.taught[0].num_tokens == len(completion.token_ids)
    assert record.teacher_rollout.prompt == prompts[i // 3]


def test_correct_answers_are_rewarded_and_counted(tmp_path):
  def write(prompt, params, index):
    del prompt, params
    return f"<solution>{2 + index}</solution>"

  _, records = _run(tmp_path, write)
  records = grading.by_rules().grade(records)

  values = [reward.value for reward in rules.exact(records)]

  assert values == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]
  summary = metrics.of_answers(records, num_bootstrap=0, seed=0)
  assert summary.keys() == {"accuracy", "accuracy_interval"}
  assert abs(summary["accuracy"] - 1 / 3) < 1e-9


def test_a_dropped_question_has_no_records(tmp_path):
  tokenizer = fakes.write_tokenizer(tmp_path)
  sampler = fakes.FakeSampler(tokenizer, lambda *_: "4")
  sampler.given_up = {"a/answer"}
  asked = single_model.SingleModelRollouts(
    roles.Role(sampler, tokenizer), "Q {question}", answer_params=_PARAMS
  )
  records = asked.run(_QUESTIONS, seed=4)
  assert [r.question.row_id for r in records] == ["b"] * 3
