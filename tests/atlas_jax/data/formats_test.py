# SPDX-License-Identifier: Apache-2.0
"""Formats are found by name, by dataset or by the columns of a row."""

import ml_collections
import pytest

from atlas_jax import errors
from atlas_jax.data import formats, rows, views

_FORMATS = formats.DATA_CONFIGS
_TURNS = [{"role": "user", "content": "q"}]


def _row(**values):
  return rows.Row("train.jsonl", 1, "train", values)


@pytest.mark.parametrize(
  ("values", "name"),
  [
    ({"messages": _TURNS, "prompt": "q", "text": "t"}, "messages"),
    ({"conversations": [{"from": "human", "value": "q"}]}, "sharegpt"),
    ({"instruction": "i", "input": "", "output": "o"}, "alpaca"),
    ({"prompt": "p", "completion": "c", "label": True}, "prompt_completion"),
    ({"prompt": "p", "ground_truth": "4"}, "default"),
    ({"question": "q", "answer": 4}, "default"),
    ({"messages": None, "question": "q", "solution": "s"}, "default"),
    ({"text": "t", "question": "", "answer": " "}, "text"),
  ],
)
def test_columns_are_recognized(values, name):
  assert formats.recognize(_row(**values)) == name


@pytest.mark.parametrize(
  "values", [{}, {"prompt": "q", "chosen": "a"}, {"problem": "q", "answer": ""}]
)
def test_unknown_columns_are_listed_with_the_flags_to_map_them(values):
  with pytest.raises(errors.DataError, match="No known format") as info:
    formats.recognize(_row(**values))
  assert (
    f"The row has columns: {rows.listed(_row(**values))}." in info.value.why
  )
  assert "prompt with completion" in info.value.why
  assert "--config.data.columns.question=COLUMN" in info.value.fix


def test_auto_selects_the_format_of_a_hub_dataset():
  for name, fmt in _FORMATS.items():
    if fmt.hub_id:
      assert formats.find("auto", fmt.hub_id.upper(), {}) is _FORMATS[name]
  assert formats.find("auto", "data/train.jsonl", {}) is None
  assert formats.find("gsm8k", "data/train.jsonl", {}) is _FORMATS["gsm8k"]


def test_config_adds_formats():
  config = ml_collections.ConfigDict(
    dict(
      mine=dict(question="{q}", keep=dict(level=("4",))),
      tagged=dict(like="gsm8k", solution="{why}"),
    )
  )
  mine = formats.find("mine", "a.jsonl", config)
  row = _row(q="x", solution="s", level=4)
  assert views.to_messages(row, mine)[0].content == "x"
  assert views.excluded_by(row, mine) == ""
  tagged = formats.find("tagged", "a.jsonl", config)
  assert tagged.answer_pattern == _FORMATS["gsm8k"].answer_pattern


@pytest.mark.parametrize(
  ("name", "fields", "message"),
  [
    ("gms8k", {}, "Did you mean 'gsm8k'"),
    ("mine", {"qestion": "{q}"}, "qestion"),
    ("mine", {"like": "gms8k"}, "Did you mean 'gsm8k'"),
    ("mine", {"answer_pattern": "("}, "unterminated"),
    ("mine", {"answer_pattern": "a"}, "one group"),
    ("mine", {"rewrites": (("a", r"\2"),)}, "invalid group reference"),
  ],
)
def test_unknown_and_malformed_formats_are_rejected(name, fields, message):
  with pytest.raises(errors.ConfigError, match=message):
    formats.find(name, "a.jsonl", {"mine": fields})
