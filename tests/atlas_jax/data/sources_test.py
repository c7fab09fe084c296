# SPDX-License-Identifier: Apache-2.0
"""Rows are read whole, and what is wrong with one is told by its place."""

import json

import pyarrow
from pyarrow import parquet
import pytest

from atlas_jax import errors, types
from atlas_jax.data import sources

_TABLE = [
  {"question": "1 + 1?", "answer": "2"},
  {"question": "A\u2028line \u00e9?", "answer": "3"},
]


def _write_lines(path, *lines):
  path.write_bytes(b"\n".join(lines) + b"\n")
  return str(path)


def _write_jsonl(path, table):
  return _write_lines(
    path, *(json.dumps(row, ensure_ascii=False).encode() for row in table)
  )


def _row(**values):
  return sources.Row("train:3", "train.jsonl, line 3", values)


def test_jsonl_and_parquet_hold_the_same_rows(tmp_path):
  lines = sources.read(_write_jsonl(tmp_path / "a.jsonl", _TABLE))
  parquet.write_table(pyarrow.Table.from_pylist(_TABLE), tmp_path / "a.parquet")
  table = sources.read(str(tmp_path / "a.parquet"))
  assert [row.values for row in lines] == _TABLE
  assert [row.values for row in table] == _TABLE
  assert [row.row_id for row in lines] == ["a:1", "a:2"]
  assert [row.row_id for row in table] == ["a:1", "a:2"]


def test_folder_is_read_in_the_order_of_names(tmp_path):
  _write_jsonl(tmp_path / "b.jsonl", _TABLE)
  _write_jsonl(tmp_path / "a.json", _TABLE[:1])
  (tmp_path / "README.md").write_text("about")
  rows = sources.read(str(tmp_path))
  assert [row.row_id for row in rows] == ["a:1", "b:1", "b:2"]


def test_blank_lines_are_skipped_but_counted(tmp_path):
  path = _write_lines(
    tmp_path / "a.jsonl", b"", b'{"x": 1}', b"  ", b'{"x": 2}'
  )
  assert [row.row_id for row in sources.read(path)] == ["a:2", "a:4"]


def test_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
  path = _write_lines(
    tmp_path / "a.jsonl", b'\xef\xbb\xbf{"x": "1"}\r', b'{"x": "2"}\r'
  )
  assert [row.values for row in sources.read(path)] == [{"x": "1"}, {"x": "2"}]


@pytest.mark.parametrize(
  ("line", "why"),
  [
    (b'{"x": ', "Expecting value"),
    (b"[1, 2]", "JSON list"),
    (b'"text"', "JSON str"),
    (b'{"x": "\xff"}', "UnicodeDecodeError"),
    (b"[" * 100_000, "RecursionError"),
  ],
)
def test_malformed_line_is_told_by_number(tmp_path, line, why):
  path = _write_lines(tmp_path / "a.jsonl", b'{"x": 1}', line)
  with pytest.raises(errors.DataError, match=why) as info:
    sources.read(path)
  assert info.value.where == f"{path}, line 2"


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "no such/kind.csv"])
def test_missing_or_unknown_file_is_told(tmp_path, name):
  with pytest.raises(errors.DataError) as info:
    sources.read(str(tmp_path / name))
  assert info.value.where == str(tmp_path / name)


def test_missing_relative_file_is_not_sought_on_the_hub(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(errors.DataError, match="FileNotFoundError"):
    sources.read("data/train.jsonl")


def test_broken_parquet_is_told(tmp_path):
  (tmp_path / "a.parquet").write_bytes(b"PAR1 no more")
  with pytest.raises(errors.DataError, match=r"a\.parquet"):
    sources.read(str(tmp_path / "a.parquet"))


def test_empty_file_and_empty_folder_are_refused(tmp_path):
  (tmp_path / "folder").mkdir()
  for path in (_write_lines(tmp_path / "a.jsonl", b""), tmp_path / "folder"):
    with pytest.raises(errors.DataError, match="empty"):
      sources.read(str(path))


def test_missing_column_names_the_columns_there():
  with pytest.raises(errors.DataError) as info:
    sources.text(_row(prompt="a", solution=None), "question", "solution")
  assert "question or solution" in info.value.what
  assert info.value.why == "Its columns are: prompt, solution (null)."
  assert info.value.where == "train.jsonl, line 3"


@pytest.mark.parametrize(
  ("value", "why"),
  [
    (42, "int 42"),
    (float("nan"), "float nan"),
    (True, "bool True"),
    (["a"], "list"),
    (" \n", "blank"),
    ("\ud800", "surrogate"),
  ],
)
def test_value_that_is_no_text_is_refused(value, why):
  with pytest.raises(errors.DataError, match=why) as info:
    sources.text(_row(question=value), "question")
  assert info.value.where == "train.jsonl, line 3"


def test_optional_text_may_be_absent_null_or_empty_but_not_a_number():
  for row in (_row(), _row(trace=None), _row(trace="")):
    assert sources.optional_text(row, "trace") == ""
  assert sources.optional_text(_row(trace="a"), "trace") == "a"
  with pytest.raises(errors.DataError, match="float nan"):
    sources.optional_text(_row(trace=float("nan")), "trace")


def test_questions_take_the_first_answer_column_with_a_value():
  rows = [
    _row(question="a", answer="1", ground_truth="2", solution="3", id="x"),
    _row(question="b", answer=None, ground_truth="2", solution="3", id=7),
    _row(question="c", solution="3", difficulty="hard"),
  ]
  assert sources.questions(rows) == [
    types.Question("x", "a", "1", solution="3"),
    types.Question("7", "b", "2", solution="3"),
    types.Question("train:3", "c", "3", "hard", solution="3"),
  ]


def test_row_id_goes_before_id_and_difficulty_may_be_a_number():
  rows = [_row(question="a", answer="1", row_id="r", id="x", difficulty=0.5)]
  assert sources.questions(rows) == [types.Question("r", "a", "1", "0.5")]


@pytest.mark.parametrize("difficulty", [float("nan"), ["hard"]])
def test_difficulty_that_is_no_label_is_refused(difficulty):
  row = _row(question="a", answer="1", difficulty=difficulty)
  with pytest.raises(errors.DataError, match="difficulty"):
    sources.questions([row])


def test_two_rows_of_one_name_are_refused():
  row = _row(question="a", answer="1", id="x")
  with pytest.raises(errors.DataError, match="'x'"):
    sources.questions([row, row])
