# SPDX-License-Identifier: Apache-2.0
"""Counts rows that are left out, and lists invalid ones in a file."""

import collections
import json
import pathlib

from absl import logging

from atlas_jax import errors

_NUM_LOGGED = 3  # Invalid rows that are logged; the file lists all of them.


class Quarantine:
  """Records invalid rows, up to a limit.

  `first` is the error of the first invalid row since the last `take_counts`.
  """

  def __init__(self, path: pathlib.Path | None, *, max_bad_rows: int) -> None:
    """Removes the file of an earlier start of the same run.

    Args:
      path: file to which each invalid row appends a JSON line with `file`,
        `line` and `reason`; None on all hosts but one, which write nothing.
      max_bad_rows: more invalid rows are an error.
    """
    self._path = path
    self._max_bad_rows = max_bad_rows
    self._num_bad = 0
    self.first: errors.DataError | None = None
    self._left_out: collections.Counter[str] = collections.Counter()
    if path:
      path.unlink(missing_ok=True)

  def bad(self, file: str, line: int, error: errors.DataError) -> None:
    """Records an invalid row.

    Raises:
      errors.DataError: if there are more than `max_bad_rows`.
    """
    self.drop("quarantined")
    self.first = self.first or error
    self._num_bad += 1
    reason = f"{error.what} {error.why}"
    if self._path:
      entry = {"file": file, "line": line, "reason": reason}
      with self._path.open("a", encoding="utf-8") as out:
        out.write(json.dumps(entry) + "\n")
    if self._num_bad > self._max_bad_rows:
      raise errors.DataError(
        f"{self._num_bad} rows are invalid, max_bad_rows is "
        f"{self._max_bad_rows}. {error.what}",
        where=f"{file}:{line}",
        why=error.why,
        fix=f"{error.fix} To leave out invalid rows, increase "
        "--config.data.max_bad_rows. They are listed in "
        f"{self._path or 'quarantine.jsonl'}.",
      ) from error
    if self._num_bad <= _NUM_LOGGED:
      logging.warning("Left out row %s:%d: %s", file, line, reason)

  def drop(self, reason: str) -> None:
    """Counts a row that is left out for `reason`."""
    self._left_out[reason] += 1

  def take_counts(self) -> str:
    """Returns the counts of rows left out since the last call, by reason."""
    counts = [f"{count} {reason}" for reason, count in self._left_out.items()]
    self._left_out.clear()
    self.first = None
    return ", ".join(counts)
