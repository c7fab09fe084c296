# SPDX-License-Identifier: Apache-2.0
"""Tests metrics of held-out questions."""

import dataclasses
import zlib

import pytest

from atlas_jax import errors, types
from atlas_jax.evaluation import held_out
from atlas_jax.rewards import grading
from atlas_jax.teaching import protocol, roles, templates
from tests import fakes

_QUESTIONS = [
  types.Question(
    f"q{i}", f"What is {i} + 1?", str(i + 1), paraphrase=f"{i} plus 1?"
  )
  for i in range(4)
]


def _knows_one(prompt, params, index):
  """Knows one answer, and the others if taught."""
  del params, index
  number = int(prompt.row_id[1])
  is_known = "hint" in prompt.text or number == 0
  return f"The answer is {number + 1 if is_known else 99}."


def _guesses(prompt, params, index):
  """Is right half of the time; random by row id, seed and index."""
  name = f"{prompt.row_id} {params.seed} {index}"
  is_right = zlib.crc32(name.encode()) % 2
  return f"The answer is {int(prompt.row_id[1]) + 1 if is_right else 99}."


def _protocol(tmp_path, *, teaching, given_up=(), answer=_knows_one):
  tokenizer = fakes.write_tokenizer(tmp_path)
  params = types.SamplingParams(1, 64, 1.0, 1.0, 0, 0)
  policy = fakes.FakeSampler(tokenizer, lambda *_: teaching)
  policy.given_up = set(given_up)
  return protocol.Protocol(
    roles.Role(policy, tokenizer),
    roles.Role(fakes.FakeSampler(tokenizer, answer), tokenizer),
    templates.Templates(
      "{question}", "{question}{probe}", "{question}{teaching}", "{question}"
    ),
    probe_params=params,
    teach_params=dataclasses.replace(params, group_size=2),
    solve_params=params,
    baseline_params=dataclasses.replace(params, group_size=3),
  )


def _evaluate(tmp_path, **settings):
  return _run(_protocol(tmp_path, **settings))


def _run(made):
  return held_out.evaluate(
    made,
    _QUESTIONS,
    grader=grading.by_rules(),
    seed=1,
    num_bootstrap=50,
    max_dropped_fraction=0.25,
  )


def test_success_and_its_interval_are_measured(tmp_path):
  numbers = _evaluate(tmp_path, teaching="<teaching>hint</teaching>")
  assert numbers["eval/teaching/num_questions"] == 4
  assert numbers["eval/teaching/accuracy"] == 1.0
  assert numbers["eval/teaching/baseline_accuracy"] == 0.25
  assert numbers["eval/teaching/APG"] == 0.75
  assert numbers["eval/teaching/NDR"] == 1.0
  assert numbers["eval/teaching/completion_rate"] == 1.0
  assert numbers["eval/teaching/TES"] > 0.0
  assert numbers["eval/teaching/num_paraphrases"] == 4
  assert numbers["eval/teaching/echo_proof_accuracy"] == 1.0
  for name in ("accuracy", "NDR", "echo_proof_accuracy", "APG", "TES", "LR"):
    low, value, high = (
      numbers[f"eval/teaching/{name}{end}"] for end in ("_low", "", "_high")
    )
    assert low <= value <= high


def test_a_resumed_run_evaluates_as_one_that_kept_its_baselines(tmp_path):
  settings = {"teaching": "<teaching>x</teaching>", "answer": _guesses}
  kept = _protocol(tmp_path, **settings)
  found = [_run(kept), _run(kept), _evaluate(tmp_path, **settings)]
  for numbers in found:
    del numbers["eval/teaching/seconds"]
  assert 0.0 < found[0]["eval/teaching/baseline_accuracy"] < 1.0
  assert found[0] == found[1] == found[2]


def test_undefined_metrics_are_left_out(tmp_path):
  numbers = _evaluate(tmp_path, teaching="no tag")
  assert numbers["eval/teaching/APG"] == 0.0
  assert numbers["eval/teaching/echo_proof_accuracy"] == 0.25
  assert numbers["eval/teaching/no_teaching_rate"] == 1.0
  assert not [name for name in numbers if "TES" in name]


@pytest.mark.parametrize(
  ("summary", "numbers"),
  [
    ({"a": 1}, {"a": 1.0}),
    ({"a": None, "a_interval": None}, {}),
    ({"a_interval": [0.1, 0.2]}, {"a_low": 0.1, "a_high": 0.2}),
  ],
)
def test_a_summary_is_flattened_to_floats(summary, numbers):
  assert held_out.flatten(summary) == numbers


def test_dropped_questions_are_counted_and_excluded(tmp_path):
  teaching = "<teaching>hint</teaching>"
  numbers = _evaluate(tmp_path, teaching=teaching, given_up=["q0/teach"])
  assert numbers["eval/dropped_fraction"] == 0.25
  assert numbers["eval/teaching/num_questions"] == 3
  assert numbers["eval/teaching/accuracy"] == 1.0
  assert numbers["eval/teaching/baseline_accuracy"] == 0.0
  assert _evaluate(tmp_path, teaching=teaching)["eval/dropped_fraction"] == 0.0
  with pytest.raises(errors.RolloutError, match="2 of 4 questions"):
    _evaluate(tmp_path, teaching=teaching, given_up=["q0/teach", "q1/teach"])
