# SPDX-License-Identifier: Apache-2.0
"""Invalid rows are listed with location and reason, up to a limit."""

import json

import pytest

from atlas_jax import errors
from atlas_jax.data import quarantine


def _error(where="a.jsonl:1"):
  return errors.DataError("It is bad.", where=where, why="So.", fix="Fix it.")


def test_invalid_rows_are_listed_up_to_the_limit(tmp_path):
  path = tmp_path / "quarantine.jsonl"
  kept_apart = quarantine.Quarantine(path, max_bad_rows=2)
  for line in (4, 7):
    kept_apart.bad("a.jsonl", line, _error())
  with pytest.raises(
    errors.DataError, match="3 rows are invalid, max_bad_rows is 2"
  ) as info:
    kept_apart.bad("b\u00e9.jsonl", 9, _error("b\u00e9.jsonl:9"))
  assert info.value.exit_code == 3
  assert info.value.where == "b\u00e9.jsonl:9"
  assert [json.loads(line) for line in path.read_text().splitlines()] == [
    {"file": "a.jsonl", "line": 4, "reason": "It is bad. So."},
    {"file": "a.jsonl", "line": 7, "reason": "It is bad. So."},
    {"file": "b\u00e9.jsonl", "line": 9, "reason": "It is bad. So."},
  ]


def test_list_of_an_earlier_start_is_replaced(tmp_path):
  path = tmp_path / "quarantine.jsonl"
  path.write_text("old\n")
  quarantine.Quarantine(path, max_bad_rows=0)
  assert not path.exists()


def test_without_a_path_rows_are_only_counted():
  kept_apart = quarantine.Quarantine(None, max_bad_rows=1)
  kept_apart.bad("a.jsonl", 4, _error())
  kept_apart.drop("filtered by level")
  kept_apart.drop("filtered by level")
  counts = kept_apart.take_counts()
  assert counts == "1 quarantined, 2 filtered by level"
  assert kept_apart.take_counts() == ""
