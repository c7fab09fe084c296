# SPDX-License-Identifier: Apache-2.0
"""Holds the metrics of a run to `docs/metrics.md`, both ways."""

from collections.abc import Iterable, Mapping
import fnmatch
import pathlib

_PAGE = pathlib.Path(__file__).parents[1] / "docs/metrics.md"
# Conditions that the runs of the tests meet.
_SEEN = ("after one", "evaluated", "sampled in time", "updated", "same weights")


def check(recipe: str, rows: Iterable[Mapping[str, object]]) -> None:
  """Fails if a run says what the page does not, or the other way round."""
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
  told = {name for row in rows for name in row} - {"step", "time"}
  unknown = [
    name
    for name in told
    if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
  ]
  assert not unknown, f"docs/metrics.md does not explain {sorted(unknown)}"
  trained = [row for row in rows if "loss" in row or "reward" in row]
  missing = [
    pattern
    for pattern, when in patterns.items()
    if not when and not all(fnmatch.filter(row, pattern) for row in trained)
  ]
  assert not missing, f"docs/metrics.md promises {missing} on every line"
  sometimes = {p for p, when in patterns.items() if when in _SEEN}
  unseen = [p for p in sometimes if not fnmatch.filter(told, p)]
  assert not unseen, f"docs/metrics.md explains {unseen}, and no run told them"
