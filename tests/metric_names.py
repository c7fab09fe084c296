# SPDX-License-Identifier: Apache-2.0
"""Compares the metrics of a run with `docs/metrics.md`."""

from collections.abc import Iterable, Mapping
import fnmatch
import pathlib

_PAGE = pathlib.Path(__file__).parents[1] / "docs/metrics.md"
# Conditions that hold in the test runs.
_SEEN = ("when due", "evaluated", "sampled in step", "updated", "same weights")


def check(recipe: str, rows: Iterable[Mapping[str, object]]) -> None:
  """Checks that reported and documented metrics are the same."""
  text = _PAGE.read_text(encoding="utf-8").partition("## Metrics")[2]
  lines = [line for line in text.splitlines() if line.startswith("| `")]
  cells = [[c.strip() for c in line.split("|")[1:-1]] for line in lines]
  patterns = {
    name.strip("`"): when
    for name, of, _, when, _ in cells
    if of == "all" or recipe in of.split(", ")
  }
  assert patterns
  rows = list(rows)
  reported = {name for row in rows for name in row} - {"step", "time"}
  unknown = [
    name
    for name in reported
    if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
  ]
  assert not unknown, f"docs/metrics.md does not document {sorted(unknown)}"
  trained = [row for row in rows if "loss" in row or "reward" in row]
  missing = [
    pattern
    for pattern, when in patterns.items()
    if not when and not all(fnmatch.filter(row, pattern) for row in trained)
  ]
  assert not missing, f"docs/metrics.md documents {missing} for every line"
  sometimes = {p for p, when in patterns.items() if when in _SEEN}
  unseen = [p for p in sometimes if not fnmatch.filter(reported, p)]
  assert not unseen, f"docs/metrics.md documents {unseen}, never reported"
