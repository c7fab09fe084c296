# SPDX-License-Identifier: Apache-2.0
"""Columns make the conversation their format says, or are refused."""

import dataclasses

import pytest

from atlas_jax import errors, types
from atlas_jax.data import formats, sources

_DEFAULT = formats.DATA_CONFIGS["default"]
_GUIDANCE = formats.DATA_CONFIGS["guidance"]
_CHAT = [
  {"role": "system", "content": "s"},
  {"role": "user", "content": "q"},
  {"role": "assistant", "content": "a"},
]


def _row(**values):
  return sources.Row("train:1", "train.jsonl, line 1", values)


def test_question_and_solution_make_two_turns():
  assert formats.to_messages(_row(question="q", solution="s"), _DEFAULT) == [
    types.Message("user", "q"),
    types.Message("assistant", "s"),
  ]


@pytest.mark.parametrize("trace", ["t", "\nt\n"])
def test_reasoning_trace_is_wrapped_in_front_of_the_solution(trace):
  row = _row(question="q", solution="s", reasoning_trace=trace)
  assert formats.to_messages(row, _DEFAULT)[-1] == types.Message(
    "assistant", "<think>\nt\n</think>\n\ns"
  )


def test_format_names_columns_and_system_prompt():
  fmt = dataclasses.replace(_DEFAULT, system_prompt="p", question="prompt")
  assert formats.to_messages(_row(prompt="q", solution="s"), fmt) == [
    types.Message("system", "p"),
    types.Message("user", "q"),
    types.Message("assistant", "s"),
  ]


@pytest.mark.parametrize("fmt", [_DEFAULT, _GUIDANCE])
def test_messages_are_used_as_they_are(fmt):
  row = _row(messages=_CHAT, question="other")
  assert formats.to_messages(row, fmt) == [
    types.Message("system", "s"),
    types.Message("user", "q"),
    types.Message("assistant", "a"),
  ]


def test_guidance_without_messages_is_refused():
  row = _row(question="q", probe="p", teaching="t")
  with pytest.raises(errors.DataError, match="question, probe, teaching"):
    formats.to_messages(row, _GUIDANCE)


def test_missing_column_is_told():
  with pytest.raises(errors.DataError, match="no solution"):
    formats.to_messages(_row(question="q"), _DEFAULT)


@pytest.mark.parametrize(
  ("messages", "why"),
  [
    ("hello", "no list"),
    ([], "empty"),
    (["hello"], "Turn 1"),
    ([*_CHAT, {"role": "tool", "content": "x"}], "Turn 4"),
    ([{"role": "user"}], "NoneType"),
    ([{"role": "user", "content": 3}], "int 3"),
  ],
)
def test_malformed_messages_are_told_by_turn(messages, why):
  with pytest.raises(errors.DataError, match=why) as info:
    formats.to_messages(_row(messages=messages), _DEFAULT)
  assert info.value.where == "train.jsonl, line 1"
