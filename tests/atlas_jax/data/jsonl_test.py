# SPDX-License-Identifier: Apache-2.0
"""Malformed lines do not affect the lines around them."""

import gzip
import json
import subprocess
import sys

import hypothesis
from hypothesis import strategies as st
import pytest

from atlas_jax import errors
from atlas_jax.data import files, jsonl, quarantine

_GOOD = b'{"x": "first"}', b'{"x": "last"}'


def _write(path, *lines):
  path.write_bytes(b"\n".join(lines) + b"\n")
  return path


def _read(path, max_bad_rows=0):
  bad = path.with_name("quarantine.jsonl")
  kept_apart = quarantine.Quarantine(bad, max_bad_rows=max_bad_rows)
  found = list(jsonl.read(path, "a", kept_apart))
  listed = bad.read_text().splitlines() if bad.exists() else []
  return found, [json.loads(line) for line in listed], kept_apart.take_counts()


@pytest.mark.parametrize(
  ("line", "why"),
  [
    (b'{"x": ', "Expecting value"),
    (b"[1, 2]", "JSON list"),
    (b'"text"', "JSON str"),
    (b'{"x": "\xff"}', "UnicodeDecodeError"),
    ('{"x": "\u00e9"}'.encode("latin-1"), "UnicodeDecodeError"),
    ('{"x": "y"}'.encode("utf-16"), "UnicodeDecodeError"),
    (b'{"x": "\0"}', "control character"),
    (b"\0" * 20, "JSONDecodeError"),
    (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "RecursionError"),
    (b'{"x": ' + b"9" * 5000 + b"}", "4300"),
    (rb'{"x": "\ud800"}', "surrogate"),
    (rb'{"\udc00": 1}', "surrogate"),
    (b'{"x": NaN}', "NaN"),
    (b'{"x": -Infinity}', "Infinity"),
    (b'{"x": 1, "x": 2}', "duplicate key"),
    (b'{"x": "' + b"a" * files.MAX_ROW_BYTES + b'"}', "exceeds"),
  ],
)
def test_malformed_line_is_quarantined_and_the_rest_loads(tmp_path, line, why):
  path = _write(tmp_path / "a.jsonl", _GOOD[0], line, _GOOD[1])
  found, bad, left_out = _read(path, max_bad_rows=1)
  assert [(row.line, row.values["x"]) for row in found] == [
    (1, "first"),
    (3, "last"),
  ]
  ((entry),) = bad
  assert entry["file"] == str(path)
  assert entry["line"] == 2
  assert why in entry["reason"]
  assert len(entry["reason"]) < 500
  assert left_out == "1 quarantined"
  with pytest.raises(errors.DataError, match="Malformed") as info:
    _read(path)
  assert info.value.where == f"{path}:2"


def test_other_line_separators_are_part_of_the_text(tmp_path):
  text = "a\u2028b\u2029c\x85d"
  line = json.dumps({"x": text}, ensure_ascii=False).encode()
  found, _, _ = _read(_write(tmp_path / "a.jsonl", line, _GOOD[1]))
  assert [row.values["x"] for row in found] == [text, "last"]


def test_byte_order_mark_windows_line_ends_and_blank_lines(tmp_path):
  path = _write(
    tmp_path / "a.jsonl", b'\xef\xbb\xbf{"x": "1"}\r', b"", b'{"x": "2"}\r'
  )
  found, _, _ = _read(path)
  assert [(row.line, row.values["x"]) for row in found] == [(1, "1"), (3, "2")]


@hypothesis.given(
  st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
)
@hypothesis.example(
  "\u05e9\u05dc\u05d5\u05dd \U0001f469\u200d\U0001f52c \u6f22"
)
@hypothesis.settings(
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_any_text_round_trips(tmp_path, text):
  for ascii_only in (True, False):
    line = json.dumps({"x": text}, ensure_ascii=ascii_only).encode()
    found, _, _ = _read(_write(tmp_path / "a.jsonl", line))
    assert found[0].values == {"x": text}


def test_unfinished_last_line_is_skipped(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_bytes(_GOOD[0] + b'\n{"x": "la')
  found, bad, left_out = _read(path)
  assert [row.values["x"] for row in found] == ["first"]
  assert not bad
  assert left_out == "1 unfinished last line"
  path.write_bytes(b"\n".join(_GOOD))
  assert len(_read(path)[0]) == 2


def test_compressed_file_yields_the_same_rows(tmp_path):
  path = tmp_path / "a.jsonl.gz"
  with gzip.open(path, "wb") as file:
    file.write(b"\n".join(_GOOD))
  assert len(_read(path)[0]) == 2


def test_truncated_compressed_file_is_an_error(tmp_path):
  path = tmp_path / "a.jsonl.gz"
  with gzip.open(path, "wb") as file:
    file.writelines(b'{"x": %d}\n' % i for i in range(1000))
  path.write_bytes(path.read_bytes()[:-20])
  with pytest.raises(errors.DataError, match="EOFError"):
    _read(path, max_bad_rows=10)
  path.write_bytes(b"no gzip")
  with pytest.raises(errors.DataError, match="BadGzipFile"):
    _read(path, max_bad_rows=10)


def test_missing_file_is_an_error(tmp_path):
  with pytest.raises(errors.DataError, match="FileNotFoundError"):
    _read(tmp_path / "a.jsonl")


_LIST = [{"x": 'a]}",\\'}, {"x": [{"y": "\\\\"}], "z": "\u00e9"}, {}]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("chunk", [1, 2, 7, 2**20])
def test_a_list_of_objects_is_read_like_lines(
  tmp_path, monkeypatch, indent, chunk
):
  monkeypatch.setattr(jsonl, "_CHUNK_BYTES", chunk)
  text = json.dumps(_LIST, indent=indent, ensure_ascii=False)
  path = tmp_path / "a.json"
  path.write_bytes(b"\xef\xbb\xbf\n" + text.encode() + b"\n\n")
  found, bad, _ = _read(path)
  assert [row.values for row in found] == _LIST
  assert [row.line for row in found] == [1, 2, 3]
  assert bad == []
  path.write_text(" [ ] ")
  assert _read(path)[0] == []


def test_bad_elements_are_quarantined_and_the_rest_loads(tmp_path, monkeypatch):
  monkeypatch.setattr(files, "MAX_ROW_BYTES", 40)
  monkeypatch.setattr(jsonl, "_CHUNK_BYTES", 8)
  path = tmp_path / "a.json"
  long = '{"x": "' + "a" * 100 + '"}'
  path.write_text(f'[{{"x": 1}}, [5], {{"x": 1, "x": 2}},{long},, {{"x": 2}}]')
  found, bad, _ = _read(path, max_bad_rows=4)
  assert [(row.line, row.values["x"]) for row in found] == [(1, 1), (6, 2)]
  assert [entry["line"] for entry in bad] == [2, 3, 4, 5]
  reasons = " ".join(entry["reason"] for entry in bad)
  for why in ("JSON list", "duplicate key", "exceeds 40", "Expecting value"):
    assert why in reasons


@pytest.mark.parametrize(
  ("text", "why"),
  [
    ('[{"x": 1}, {"x"', "does not end"),
    ('[{"x": "]', "does not end"),
    ('[{"x": 1}] {"x": 2}', "Text follows"),
  ],
)
def test_a_list_that_is_not_the_whole_file_is_an_error(tmp_path, text, why):
  (tmp_path / "a.json").write_text(text)
  with pytest.raises(errors.DataError, match=why):
    _read(tmp_path / "a.json", max_bad_rows=10)


_COUNT = """
import pathlib, resource, sys
from atlas_jax.data import files, jsonl, quarantine
kept_apart = quarantine.Quarantine(None, max_bad_rows=1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = jsonl.read(pathlib.Path(sys.argv[1]), "a", kept_apart)
count = sum(1 for _ in found)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(count, kept_apart.take_counts(), "/", grown // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
  ("start", "between", "end"), [(b"", b"\n", b"\n"), (b"[", b",", b"]")]
)
def test_huge_rows_and_many_rows_use_little_memory(
  tmp_path, start, between, end
):
  path = tmp_path / "a.json"
  row = b'{"x": "' + b"a" * 500 + b'"}'
  with path.open("wb") as file:
    file.write(start + row + between)
    file.write(b'{"x": "')
    for _ in range(200):
      file.write(b"a" * 2**20)
    file.write(b'"}')
    for _ in range(100):
      file.write((between + row) * 1000)
    file.write(end)
  stdout = subprocess.run(
    [sys.executable, "-c", _COUNT, str(path)],
    capture_output=True,
    text=True,
    check=True,
    timeout=120,
  ).stdout
  read, _, grown_mb = stdout.partition(" / ")
  assert read == "100001 1 quarantined"
  assert int(grown_mb) < 100
