# SPDX-License-Identifier: Apache-2.0
"""Mapped columns take the place of those that formats read."""

import pytest

from atlas_jax import errors
from atlas_jax.data import columns, formats, rows


def _row(**values):
  return rows.Row("train.csv", 2, "train", values)


@pytest.mark.parametrize(
  ("mapped", "expected", "name"),
  [
    ({"question": "task", "answer": "result"}, ("t", "r"), "default"),
    ({"question": "task", "solution": "result"}, ("t", "4"), "default"),
    ({"answer": "result"}, ("q", "r"), "messages"),
  ],
)
def test_mapped_columns_replace_those_of_the_same_kind(mapped, expected, name):
  row = _row(task="t", result="r", question="q", answer="4", messages=[1])
  renamed = columns.Columns(**mapped).rename(row)
  values = renamed.values
  assert (values["question"], values["answer"]) == expected
  assert formats.recognize(renamed) == name


def test_a_column_may_be_mapped_to_itself():
  row = _row(problem="p", solution="s", answer="4", completion="c")
  mapped = columns.Columns(
    question="problem", solution="solution", answer="answer"
  )
  assert mapped.rename(row).values == {
    **{"problem": "p", "question": "p"},
    **{"solution": "s", "answer": "4"},
  }
  assert mapped.original("question") == "problem"
  assert mapped.original("system") == "system"


def test_text_and_messages_can_be_mapped():
  row = _row(body="b", messages=[1], question="q", answer="a")
  renamed = columns.Columns(text="body").rename(row)
  assert formats.recognize(renamed) == "text"
  renamed = columns.Columns(messages="body").rename(row)
  assert renamed.values["messages"] == "b"


def test_a_missing_column_is_reported_with_its_flag():
  mapped = columns.Columns(question="problem", answer="answr")
  with pytest.raises(errors.DataError, match="Missing column: answr") as info:
    mapped.rename(_row(problem="p", answer="", notes="n"))
  assert (
    info.value.why == "The row has columns: problem, answer (empty), notes."
  )
  assert "--config.data.columns.answer" in info.value.fix


@pytest.mark.parametrize(
  ("values", "roles"),
  [
    ({"prompt": [{"role": "user"}], "completion": [{"role": "assistant"}]}, 2),
    ({"prompt": [{"role": "user"}], "completion": "c"}, 2),
    ({"prompt": "p", "completion": [{"role": "assistant"}]}, 2),
    ({"prompt": [{"role": "user"}], "answer": "4"}, 1),
  ],
)
def test_lists_of_turns_become_a_conversation(values, roles):
  joined = columns.join_turns(_row(**values)).values
  found = [turn["role"] for turn in joined["messages"]]
  assert found == ["user", "assistant"][:roles]
  assert "prompt" not in joined
  assert joined.get("answer") == values.get("answer")


def test_prompts_of_text_are_kept():
  row = _row(prompt="p", completion="c")
  assert columns.join_turns(row) is row
