# SPDX-License-Identifier: Apache-2.0
"""Batches by number: the same step gives the same batch, on every host."""

from collections.abc import Mapping, Sequence
import functools
import hashlib
from typing import Literal

import numpy as np

from atlas_jax import errors, types

Remainder = Literal["drop", "pad"]


class Loader:
  """Shuffled batches of rows, addressed by the step they belong to.

  Its only state is the step, which the caller keeps: `batch(step)` depends on
  nothing else, so resuming is going on with the next number.
  """

  def __init__(
    self,
    arrays: Mapping[str, np.ndarray],
    *,
    names: Sequence[str],
    batch_size: int,
    seed: int,
    remainder: Remainder,
    process_index: int,
    process_count: int,
  ) -> None:
    """Takes arrays which share their first axis, the rows.

    Args:
      arrays: on every host the same.
      names: of the rows, for a user to find them by.
      batch_size: rows of a batch, over all hosts.
      seed: of the order, which is drawn anew for each epoch.
      remainder: the rows that fill no batch at the end of an epoch are left
        out ("drop", each epoch others), or filled up with rows of zeros ("pad",
        to see every row once).
      process_index: which of the equal slices of a batch this host gets.
      process_count: number of hosts.

    Raises:
      errors.DataError: if there are too few rows to make a batch.
      errors.ConfigError: if the hosts cannot share a batch equally.
    """
    num_rows = {len(names), *map(len, arrays.values())}
    if len(num_rows) != 1:
      raise ValueError(f"Expected arrays of as many rows, got {num_rows}.")
    if remainder not in ("drop", "pad"):
      raise ValueError(
        f'Expected remainder of "drop" or "pad", got {remainder!r}.'
      )
    if batch_size < 1 or batch_size % process_count:
      raise errors.ConfigError(
        "The hosts cannot share a batch.",
        where=f"host {process_index} of {process_count}",
        why=f"A batch has {batch_size} rows, and all take the same number.",
        fix="Make batch_size a positive multiple of the number of hosts.",
      )
    (self._num_rows,) = num_rows
    _check_enough(self._num_rows, batch_size if remainder == "drop" else 1)
    self._arrays = dict(arrays)
    self._names = list(names)
    self._batch_size = batch_size
    self._seed = seed
    self._remainder = remainder
    share = batch_size // process_count
    self._mine = slice(process_index * share, (process_index + 1) * share)

  @property
  def num_batches_per_epoch(self) -> int:
    """How many steps see every row once, but for a dropped remainder."""
    full, rest = divmod(self._num_rows, self._batch_size)
    return full + (rest > 0 and self._remainder == "pad")

  def batch(self, step: int) -> dict[str, np.ndarray]:
    """Returns this host's rows of the batch which `step` trains on."""
    rows = self._rows(step)[self._mine]
    missing = self._mine.stop - self._mine.start - len(rows)
    return {
      name: np.pad(array[rows], [(0, missing)] + [(0, 0)] * (array.ndim - 1))
      for name, array in self._arrays.items()
    }

  def row_names(self, step: int) -> list[str]:
    """Names the rows of all hosts which `step` trains on."""
    return [self._names[row] for row in self._rows(step)]

  def _rows(self, step: int) -> np.ndarray:
    epoch, number = divmod(step, self.num_batches_per_epoch)
    order = _order(self._seed, epoch, self._num_rows)
    start = number * self._batch_size
    return order[start : start + self._batch_size]

  def fingerprint(self) -> str:
    """Returns a digest of all rows, to refuse resuming with other data."""
    digest = hashlib.sha256()
    for name, array in sorted(self._arrays.items()):
      digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
      digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def question_batch(
  questions: Sequence[types.Question], step: int, batch_size: int, seed: int
) -> list[types.Question]:
  """Returns the questions of `step`, shuffled anew for each epoch.

  An epoch ends with the last full batch, so no question is twice in a batch.

  Raises:
    errors.DataError: if there are fewer questions than `batch_size`.
  """
  _check_enough(len(questions), batch_size)
  epoch, number = divmod(step, len(questions) // batch_size)
  order = _order(seed, epoch, len(questions))
  start = number * batch_size
  return [questions[i] for i in order[start : start + batch_size]]


def fingerprint(questions: Sequence[types.Question]) -> str:
  """Returns a digest of questions and their order, as `Loader.fingerprint`."""
  lines = "\n".join(types.to_json_line(question) for question in questions)
  return hashlib.sha256(lines.encode()).hexdigest()


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
  return np.random.default_rng((seed, epoch)).permutation(num_rows)


def _check_enough(num_rows: int, needed: int) -> None:
  if num_rows < needed:
    raise errors.DataError(
      "There are too few rows to make a batch.",
      where=f"{num_rows} rows after dropping and packing",
      why=f"A batch takes {needed}.",
      fix="Make batch_size smaller, rows shorter, or bring more data.",
    )
