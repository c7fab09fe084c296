# SPDX-License-Identifier: Apache-2.0
"""Rows that are left out: counted by reason, and bad ones written down."""

import collections
import json
import pathlib

from absl import logging

from atlas_jax import errors

_NUM_TOLD = 3  # Bad rows that are told as they are found; the file has all.


class Quarantine:
  """Keeps bad rows apart, up to a limit."""

  def __init__(self, path: pathlib.Path | None, *, max_bad_rows: int) -> None:
    """Starts anew: what an earlier start of the same run wrote is removed.

    Args:
      path: a JSON line goes there for each bad row, with `file`, `line` and
        `reason`; None writes nothing, for all hosts but one.
      max_bad_rows: one more is an error.
    """
    self._path = path
    self._max_bad_rows = max_bad_rows
    self._num_bad = 0
    self._left_out: collections.Counter[str] = collections.Counter()
    if path:
      path.unlink(missing_ok=True)

  def bad(self, file: str, line: int, error: errors.DataError) -> None:
    """Takes a row that cannot be used.

    Raises:
      errors.DataError: if it is one too many.
    """
    self.drop("in quarantine")
    self._num_bad += 1
    reason = f"{error.what} {error.why}"
    if self._path:
      entry = {"file": file, "line": line, "reason": reason}
      with self._path.open("a", encoding="utf-8") as out:
        out.write(json.dumps(entry) + "\n")
    if self._num_bad > self._max_bad_rows:
      raise errors.DataError(
        f"Too many rows are bad: {self._num_bad}. {error.what}",
        where=f"{file}:{line}",
        why=error.why,
        fix=f"{error.fix} --config.data.max_bad_rows, now "
        f"{self._max_bad_rows}, lets some be left out; "
        f"{self._path or 'quarantine.jsonl'} lists them.",
      ) from error
    if self._num_bad <= _NUM_TOLD:
      logging.warning("Left out %s:%d. %s", file, line, reason)

  def drop(self, reason: str) -> None:
    """Counts a row that is left out for a good reason."""
    self._left_out[reason] += 1

  def take_counts(self) -> str:
    """Says how many rows were left out since asked last, by reason."""
    told = [f"{count} {reason}" for reason, count in self._left_out.items()]
    self._left_out.clear()
    return ", ".join(told)
