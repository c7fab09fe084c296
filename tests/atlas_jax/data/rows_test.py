# SPDX-License-Identifier: Apache-2.0
"""Text is read from columns, or rejected with the location of its row."""

import pytest

from atlas_jax import errors
from atlas_jax.data import rows


def _row(**values):
  return rows.Row("data/train.jsonl", 3, "train", values)


def test_row_id_has_file_and_line_but_no_directory():
  assert _row().where == "data/train.jsonl:3"
  assert _row().row_id == "train:3"


def test_the_first_column_that_is_not_empty_is_taken():
  row = _row(a=None, b=" \n", c="x", d="y")
  assert rows.text(row, "a", "b", "c", "d") == "x"


def test_missing_column_error_lists_the_columns():
  with pytest.raises(errors.DataError) as info:
    rows.text(_row(prompt="a", solution=None), "question", "solution")
  assert "question or solution" in info.value.what
  assert info.value.why == "The row has columns: prompt, solution (empty)."
  assert info.value.where == "data/train.jsonl:3"


@pytest.mark.parametrize(
  ("value", "why"),
  [
    (float("nan"), "float nan"),
    (float("inf"), "float inf"),
    (True, "bool True"),
    (["a"], "list"),
    ("a\0b", "NUL"),
    ("\ud800", "surrogate"),
  ],
)
def test_value_that_is_not_text_is_rejected(value, why):
  with pytest.raises(errors.DataError, match=why) as info:
    rows.text(_row(question=value), "question")
  assert info.value.where == "data/train.jsonl:3"


@pytest.mark.parametrize(("value", "text"), [(42, "42"), (0.5, "0.5")])
def test_number_is_converted_to_text(value, text):
  assert rows.text(_row(answer=value), "answer") == text


def test_optional_text_may_be_absent_null_or_blank():
  for row in (_row(), _row(trace=None), _row(trace=" ")):
    assert rows.optional_text(row, "trace") == ""
  assert rows.optional_text(_row(trace="a"), "trace") == "a"
