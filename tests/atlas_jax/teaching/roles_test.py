# SPDX-License-Identifier: Apache-2.0
"""Tests how models are asked and read: limits of prompts and of thinking."""

import dataclasses

import pytest

from atlas_jax import errors, types
from atlas_jax.teaching import roles
from tests import fakes

_PARAMS = types.SamplingParams(
  group_size=2,
  max_completion_tokens=20,
  temperature=1.0,
  top_p=1.0,
  top_k=0,
  seed=3,
)


@pytest.fixture
def tokenizer(tmp_path):
  return fakes.write_tokenizer(tmp_path)


def _role(tokenizer, write, **limits):
  return roles.Role(fakes.FakeSampler(tokenizer, write), tokenizer, **limits)


def _prompts(role, *texts):
  return [role.prompt(f"row {i}", text) for i, text in enumerate(texts)]


def test_long_prompts_are_dropped(tokenizer):
  role = _role(tokenizer, lambda *_: "a")
  short, long = _prompts(role, "x", "x" * 50)
  num_short, num_long = len(short.token_ids), len(long.token_ids)
  for limits in ({"max_prompt_tokens": num_short}, {}):
    role = dataclasses.replace(role, **limits)
    assert list(map(len, role.sample([long, short], _PARAMS))) == [0, 2]
    assert role.write([long, short], _PARAMS)[0] == ()
    # Without the limit, the context is too short.
    role.sampler.context_length = num_long + 19
  role.sampler.context_length = num_long + 20
  role = dataclasses.replace(role, max_prompt_tokens=0)
  assert list(map(len, role.sample([long, short], _PARAMS))) == [2, 2]


def test_an_empty_context_is_a_config_error(tokenizer):
  role = _role(tokenizer, lambda *_: "a")
  role.sampler.context_length = 20
  with pytest.raises(errors.ConfigError, match="no room"):
    role.sample(_prompts(role, "x"), _PARAMS)
  with pytest.raises(errors.ConfigError, match="max_thinking_tokens"):
    _role(tokenizer, lambda *_: "a", max_thinking_tokens=-1)


def test_thinking_is_not_part_of_a_text(tokenizer):
  role = _role(tokenizer, lambda *_: "<think>t</think> plan")
  params = dataclasses.replace(_PARAMS, max_completion_tokens=100)
  ((first, _),) = role.write(_prompts(role, "x"), params)
  assert first.text == "plan"
  assert first.num_tokens > len("plan")
  assert first.finish_reason == "stop"


def test_a_text_cut_in_its_thinking_is_empty(tokenizer, caplog):
  role = _role(tokenizer, lambda *_: "<think>" + "t" * 50)
  ((first, _),) = role.write(_prompts(role, "x"), _PARAMS)
  assert (first.text, first.finish_reason) == ("", "length")
  assert "2 of 2 texts" in caplog.text


def _thinks(prompt, params, index):
  """Thinks longer in draw 1; continues with an answer."""
  del params
  if prompt.row_id.count("/"):
    return "the answer"
  return "<think>" + "t" * (60 if index else 2) + "</think>short"


def test_thinking_stops_at_its_budget(tokenizer):
  role = _role(tokenizer, _thinks, max_thinking_tokens=30)
  (prompt,) = _prompts(role, "x/y"[:1])
  ((first, second),) = role.write([prompt], _PARAMS)
  assert first.text == "short"
  assert second.text == "the answer"
  (_, begun), ((continued,), ended) = role.sampler.calls
  assert begun.max_completion_tokens == 30
  assert (ended.group_size, ended.max_completion_tokens) == (1, 20)
  num_prompt = len(prompt.token_ids)
  assert continued.token_ids[:num_prompt] == prompt.token_ids
  written = tokenizer.decode(continued.token_ids[num_prompt:])
  assert written.endswith("t\n</think>\n\n")
  assert second.num_tokens > 30


def test_an_answer_cut_by_the_thinking_budget_continues_without_a_tag(
  tokenizer,
):
  def write(prompt, *_):
    return " end" if "/" in prompt.row_id else "<think>t</think>" + "b" * 40

  role = _role(tokenizer, write, max_thinking_tokens=30)
  params = dataclasses.replace(_PARAMS, group_size=1)
  ((only,),) = role.write(_prompts(role, "x"), params)
  assert only.text.startswith("bb")
  assert only.text.endswith("b end")
  assert only.finish_reason == "stop"


def test_a_dropped_continuation_drops_its_prompt(tokenizer):
  role = _role(tokenizer, _thinks, max_thinking_tokens=30)
  role.sampler.given_up = {"row 0/1"}
  written = role.write(_prompts(role, "x", "y"), _PARAMS)
  assert list(map(len, written)) == [0, 2]
