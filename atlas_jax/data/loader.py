# SPDX-License-Identifier: Apache-2.0
"""Batches by number: the same step gives the same batch, in every process."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import hashlib
import math
from typing import Literal

import numpy as np

from atlas_jax import errors, types

Remainder = Literal["drop", "pad"]


@dataclasses.dataclass(frozen=True)
class Share:
  """Which of so many equal slices of each batch a process loads."""

  index: int
  count: int


WHOLE = Share(0, 1)


@dataclasses.dataclass(frozen=True)
class Mix:
  """The order of rows that come from several sets, one after the other.

  Attributes:
    sizes: rows of each set.
    weights: the share of each set in an epoch, which has as many rows as all
      sets together: of a set that gets less than its size each epoch sees other
      rows, and one that gets more is gone through again. Empty to see every row
      once.
    seed: of the order, which is drawn anew for each epoch.
  """

  sizes: tuple[int, ...]
  weights: tuple[float, ...]
  seed: int

  def __post_init__(self) -> None:
    """Refuses weights that are no shares of these sets."""
    if self.weights and (
      len(self.weights) != len(self.sizes)
      or not all(0.0 < weight < math.inf for weight in self.weights)
    ):
      raise errors.ConfigError(
        "The sets cannot be mixed.",
        where=f"--config.data.weights={self.weights}",
        why=f"There are {len(self.sizes)} sets, and each takes a weight above "
        "0.",
        fix="Give one weight for each path, or none to take all rows once.",
      )

  @property
  def num_rows(self) -> int:
    """Rows of an epoch."""
    return int(sum(self._counts()))

  def order(self, epoch: int) -> np.ndarray:
    """Returns the rows of an epoch by their numbers over all sets."""
    return _order(self, epoch)

  def _counts(self) -> list[int]:
    """Rows that an epoch takes of each set."""
    if not self.weights:
      return list(self.sizes)
    share = sum(self.sizes) / sum(self.weights)
    return [max(1, round(weight * share)) for weight in self.weights]

  def _rows(self, epoch: int) -> np.ndarray:
    """Returns what an epoch takes of each set, one set after the other."""
    if not self.weights:
      return np.arange(sum(self.sizes))
    starts = np.cumsum((0, *self.sizes))
    taken = []
    for number, (size, count) in enumerate(
      zip(self.sizes, self._counts(), strict=True)
    ):
      # Each set is gone through in rounds, which epochs cut anywhere.
      first, last = epoch * count, (epoch + 1) * count
      rounds = range(first // size, (last - 1) // size + 1)
      drawn = np.concatenate(
        [
          np.random.default_rng((self.seed, i, number)).permutation(size)
          for i in rounds
        ]
      )
      skipped = first - rounds.start * size
      taken.append(starts[number] + drawn[skipped : skipped + count])
    return np.concatenate(taken)


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
    mix: Mix,
    batch_size: int,
    remainder: Remainder,
    share: Share,
  ) -> None:
    """Takes arrays which share their first axis, the rows.

    Args:
      arrays: in every process the same.
      names: of the rows, for a user to find them by.
      mix: which of the rows belong to which set, and their order.
      batch_size: rows of a batch, over all processes.
      remainder: the rows that fill no batch at the end of an epoch are left
        out ("drop", each epoch others), or filled up with rows of zeros ("pad",
        to see every row once).
      share: what of a batch this process gets.

    Raises:
      errors.DataError: if there are too few rows to make a batch.
      errors.ConfigError: if processes cannot share a batch equally.
    """
    num_rows = {len(names), *map(len, arrays.values())}
    if num_rows != {sum(mix.sizes)}:
      raise ValueError(f"Expected {mix.sizes} rows, got {num_rows}.")
    if remainder not in ("drop", "pad"):
      raise ValueError(
        f'Expected remainder of "drop" or "pad", got {remainder!r}.'
      )
    if batch_size < 1 or batch_size % share.count:
      raise errors.ConfigError(
        "The processes cannot share a batch.",
        where=f"part {share.index} of {share.count}",
        why=f"A batch has {batch_size} rows, and all take the same number.",
        fix=f"Make batch_size a positive multiple of {share.count}.",
      )
    _check_enough(mix.num_rows, batch_size if remainder == "drop" else 1)
    self._arrays = dict(arrays)
    self._names = list(names)
    self._mix = mix
    self._batch_size = batch_size
    self._remainder = remainder
    size = batch_size // share.count
    self._mine = slice(share.index * size, (share.index + 1) * size)

  @property
  def num_batches_per_epoch(self) -> int:
    """How many steps see every row once, but for a dropped remainder."""
    full, rest = divmod(self._mix.num_rows, self._batch_size)
    return full + (rest > 0 and self._remainder == "pad")

  def batch(self, step: int) -> dict[str, np.ndarray]:
    """Returns this process's rows of the batch which `step` trains on."""
    rows = self._rows(step)[self._mine]
    missing = self._mine.stop - self._mine.start - len(rows)
    return {
      name: np.pad(array[rows], [(0, missing)] + [(0, 0)] * (array.ndim - 1))
      for name, array in self._arrays.items()
    }

  def row_names(self, step: int) -> list[str]:
    """Names the rows of all processes which `step` trains on."""
    return [self._names[row] for row in self._rows(step)]

  def _rows(self, step: int) -> np.ndarray:
    epoch, number = divmod(step, self.num_batches_per_epoch)
    order = self._mix.order(epoch)
    start = number * self._batch_size
    return order[start : start + self._batch_size]

  def fingerprint(self) -> str:
    """Returns a digest of all batches, to refuse resuming with others."""
    settings = (self._mix, self._batch_size, self._remainder)
    digest = hashlib.sha256(repr(settings).encode())
    for name, array in sorted(self._arrays.items()):
      digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
      digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


class QuestionLoader:
  """Shuffled batches of `questions`, by the same rule as `Loader`'s.

  An epoch ends with the last full batch, so no question is twice in a batch
  unless a set is smaller than its weight asks for.
  """

  def __init__(
    self, questions: Sequence[types.Question], *, mix: Mix, batch_size: int
  ) -> None:
    """Takes questions of all sets, one set after the other.

    Raises:
      errors.DataError: if there are fewer than `batch_size`.
    """
    _check_enough(mix.num_rows, batch_size)
    self.questions = tuple(questions)
    self._mix, self._batch_size = mix, batch_size

  def batch(self, step: int) -> list[types.Question]:
    """Returns the questions of `step`."""
    epoch, number = divmod(step, self._mix.num_rows // self._batch_size)
    start = number * self._batch_size
    rows = self._mix.order(epoch)[start : start + self._batch_size]
    return [self.questions[i] for i in rows]

  def fingerprint(self) -> str:
    """Returns a digest of all batches, as `Loader.fingerprint`."""
    settings = (self._mix, self._batch_size)
    lines = map(types.to_json_line, self.questions)
    text = "\n".join((repr(settings), *lines))
    return hashlib.sha256(text.encode()).hexdigest()


@functools.lru_cache(maxsize=4)
def _order(mix: Mix, epoch: int) -> np.ndarray:
  return np.random.default_rng((mix.seed, epoch)).permutation(mix._rows(epoch))


def _check_enough(num_rows: int, needed: int) -> None:
  if num_rows < needed:
    raise errors.DataError(
      "There are too few rows to make a batch.",
      where=f"{num_rows} rows after dropping and packing",
      why=f"A batch takes {needed}.",
      fix="Make batch_size smaller, rows shorter, or bring more data.",
    )
