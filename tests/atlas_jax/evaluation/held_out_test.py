# SPDX-License-Identifier: Apache-2.0
"""Held-out questions are taught by the protocol, and all becomes numbers."""

import dataclasses

import pytest

from atlas_jax import types
from atlas_jax.evaluation import held_out
from atlas_jax.teaching import protocol, templates
from tests import fakes

_QUESTIONS = [
  types.Question(f"q{i}", f"What is {i} + 1?", str(i + 1)) for i in range(4)
]


def _evaluate(tmp_path, *, teaching):
  """A student who knows one answer, and the others once taught."""
  tokenizer = fakes.write_tokenizer(tmp_path)

  def answer(prompt, params, index):
    del params, index
    number = int(prompt.row_id[1])
    is_known = "hint" in prompt.text or number == 0
    return f"The answer is {number + 1 if is_known else 99}."

  params = types.SamplingParams(1, 64, 1.0, 1.0, 0, 0)
  made = protocol.Protocol(
    protocol.Role(fakes.FakeSampler(tokenizer, lambda *_: teaching), tokenizer),
    protocol.Role(fakes.FakeSampler(tokenizer, answer), tokenizer),
    templates.Templates(
      "{question}", "{question}{probe}", "{question}{teaching}", "{question}"
    ),
    probe_params=params,
    teach_params=dataclasses.replace(params, group_size=2),
    solve_params=params,
    baseline_params=params,
  )
  return held_out.evaluate(made, _QUESTIONS, seed=0, num_bootstrap=50)


def test_success_and_its_interval_are_measured(tmp_path):
  numbers = _evaluate(tmp_path, teaching="<teaching>hint</teaching>")
  assert numbers["eval/teaching/num_questions"] == 4
  assert numbers["eval/teaching/accuracy"] == 1.0
  assert numbers["eval/teaching/baseline_accuracy"] == 0.25
  assert numbers["eval/teaching/APG"] == 0.75
  assert numbers["eval/teaching/NDR"] == 1.0
  assert numbers["eval/teaching/completion_rate"] == 1.0
  assert numbers["eval/teaching/TES"] > 0.0
  for name in ("accuracy", "NDR", "APG", "TES", "LR"):
    low, value, high = (
      numbers[f"eval/teaching/{name}{end}"] for end in ("_low", "", "_high")
    )
    assert low <= value <= high


def test_what_is_undefined_is_left_out(tmp_path):
  numbers = _evaluate(tmp_path, teaching="no tag")
  assert numbers["eval/teaching/APG"] == 0.0
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
def test_a_summary_becomes_numbers(summary, numbers):
  assert held_out.flatten(summary) == numbers
