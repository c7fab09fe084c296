# SPDX-License-Identifier: Apache-2.0
"""CSV and TSV files as spreadsheets and pandas write them."""

import json

import pytest

from atlas_jax import errors
from atlas_jax.data import delimited, files, quarantine


def _read(path, content, max_bad_rows=0):
  path.write_bytes(content)
  bad = path.with_name("quarantine.jsonl")
  kept_apart = quarantine.Quarantine(bad, max_bad_rows=max_bad_rows)
  found = [
    (row.line, dict(row.values))
    for row in delimited.read(path, "a", kept_apart)
  ]
  listed = bad.read_text().splitlines() if bad.exists() else []
  return found, [json.loads(line) for line in listed]


def test_quotes_newlines_and_a_byte_order_mark(tmp_path):
  content = (
    b'\xef\xbb\xbf"question", answer \r\n'
    b'"1, 2,\r\nand ""3""?",007\r\n'
    b"\r\n"
    b"4?,\xc3\xa9\r\n"
  )
  found, _ = _read(tmp_path / "a.csv", content)
  assert found == [
    (2, {"question": '1, 2,\r\nand "3"?', "answer": "007"}),
    (5, {"question": "4?", "answer": "\u00e9"}),
  ]


@pytest.mark.parametrize(
  ("name", "separator"), [("a.csv", b";"), ("a.tsv", b"\t"), ("a.csv", b",")]
)
def test_separators_follow_the_ending_and_the_first_line(
  tmp_path, name, separator
):
  content = b'question;answer\n"a;,b";c\n'.replace(b";", separator)
  found, _ = _read(tmp_path / name, content)
  ((_, row),) = found
  assert list(row) == ["question", "answer"]
  assert row["answer"] == "c"


def test_an_index_without_a_name_is_left_out(tmp_path):
  found, _ = _read(tmp_path / "a.csv", b",question\n0,a\n1,b\n")
  assert found == [(2, {"question": "a"}), (3, {"question": "b"})]


@pytest.mark.parametrize(
  ("line", "why"),
  [
    (b"1", "1 values for 2 columns"),
    (b"1,2,3", "3 values for 2 columns"),
    (b'"1"x,2', "expected after"),
    (b"\xff,2", "not UTF-8"),
    (b"a" * 200 + b",2", "field limit"),
  ],
)
def test_malformed_rows_are_quarantined_and_the_rest_loads(
  tmp_path, monkeypatch, line, why
):
  monkeypatch.setattr(files, "MAX_ROW_BYTES", 100)
  content = b"q,a\n1,2\n" + line + b"\n3,4\n"
  found, bad = _read(tmp_path / "a.csv", content, max_bad_rows=1)
  assert found == [(2, {"q": "1", "a": "2"}), (4, {"q": "3", "a": "4"})]
  ((entry),) = bad
  assert entry["line"] == 3
  assert why in entry["reason"]


def test_an_open_quote_is_an_invalid_row(tmp_path):
  found, bad = _read(tmp_path / "a.csv", b'q,a\n1,2\n"3,4\n5,6\n', 1)
  assert found == [(2, {"q": "1", "a": "2"})]
  assert "unexpected end" in bad[0]["reason"]


@pytest.mark.parametrize(
  ("content", "why"),
  [
    (b"q,a,q\n1,2,3\n", "distinct"),
    ("q,a\n1,2\n".encode("utf-16"), "not UTF-8"),
    (b'"q,a\n1,2\n', "unexpected end"),
  ],
)
def test_invalid_column_names_are_an_error(tmp_path, content, why):
  with pytest.raises(errors.DataError, match="Malformed row") as info:
    _read(tmp_path / "a.csv", content, max_bad_rows=9)
  assert why in info.value.why


@pytest.mark.parametrize("content", [b"", b"\n\n", b"q,a\n"])
def test_an_empty_table_has_no_rows(tmp_path, content):
  assert _read(tmp_path / "a.csv", content) == ([], [])
