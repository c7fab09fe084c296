# SPDX-License-Identifier: Apache-2.0
"""Deterministic batches: each step has the same batch in every process."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import hashlib
import json
import math
from typing import Literal

import numpy as np

from atlas_jax import errors, types

Remainder = Literal["drop", "pad"]


@dataclasses.dataclass(frozen=True)
class Share:
  """The slice of each batch that a process loads: `index` of `count`."""

  index: int
  count: int


WHOLE = Share(0, 1)


@dataclasses.dataclass(frozen=True)
class Mix:
  """The order of rows from several datasets, which are concatenated.

  Attributes:
    sizes: number of rows of each dataset.
    weights: share of each dataset in an epoch, which has as many rows as all
      datasets together. If a dataset gets fewer rows than its size, each epoch
      has different ones; if more, they repeat. Empty to use every row once.
    seed: seed of the order, which differs in each epoch.
  """

  sizes: tuple[int, ...]
  weights: tuple[float, ...]
  seed: int

  def __post_init__(self) -> None:
    """Validates the weights."""
    if self.weights and (
      len(self.weights) != len(self.sizes)
      or not all(0.0 < weight < math.inf for weight in self.weights)
    ):
      raise errors.ConfigError(
        "data.weights must be positive, one for each dataset, got "
        f"{self.weights} for {len(self.sizes)} datasets.",
        where=f"--config.data.weights={self.weights}",
        why="They are the shares of the datasets in an epoch.",
        fix="Set one weight for each path, or none to use every row once.",
      )

  @property
  def num_rows(self) -> int:
    """Number of rows in an epoch."""
    return int(sum(self._counts()))

  def order(self, epoch: int) -> np.ndarray:
    """Returns the rows of an epoch as indices into the concatenation."""
    return _order(self, epoch)

  def _counts(self) -> list[int]:
    """Returns how many rows of each dataset are in an epoch."""
    if not self.weights:
      return list(self.sizes)
    share = sum(self.sizes) / sum(self.weights)
    return [max(1, round(weight * share)) for weight in self.weights]

  def _rows(self, epoch: int) -> np.ndarray:
    """Returns the rows of an epoch before shuffling, dataset by dataset.

    The permutations of a dataset form one endless sequence, and epoch e takes
    the rows [e count, (e + 1) count) of it. With size = 4 and count = 3:

      permutations  2 0 3 1 | 1 3 0 2 | ...
      epochs        0 0 0 1   1 1 2 2
    """
    if not self.weights:
      return np.arange(sum(self.sizes))
    starts = np.cumsum((0, *self.sizes))
    taken = []
    for number, (size, count) in enumerate(
      zip(self.sizes, self._counts(), strict=True)
    ):
      # The permutations that overlap this epoch.
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
  """Shuffled batches of rows, addressed by step.

  `batch(step)` depends on nothing but the step, which the caller keeps: a run
  resumes by asking for the next step.
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
    """Initializes the loader.

    Args:
      arrays: share their first axis, the rows; the same in every process.
      names: of the rows, shown to the user to locate them.
      mix: the datasets that the rows belong to, and their order.
      batch_size: rows of a batch, over all processes.
      remainder: whether rows that fill no batch at the end of an epoch are
        dropped ("drop", different ones in each epoch) or padded to a batch with
        rows of zeros ("pad", to see every row once). An epoch with fewer rows
        than a batch is always padded.
      share: the slice of each batch that this process loads.

    Raises:
      errors.ConfigError: if `batch_size` does not divide by the processes.
    """
    num_rows = {len(names), *map(len, arrays.values())}
    if num_rows != {sum(mix.sizes)}:
      raise ValueError(
        f"arrays and names must have {sum(mix.sizes)} rows, got {num_rows}."
      )
    if remainder not in ("drop", "pad"):
      raise ValueError(f'remainder must be "drop" or "pad", got {remainder!r}.')
    if batch_size < 1 or batch_size % share.count:
      raise errors.ConfigError(
        f"batch_size must be a positive multiple of {share.count}, got "
        f"{batch_size}.",
        where=f"process slice {share.index} of {share.count}",
        why="All processes load the same number of rows.",
        fix=f"Set batch_size to a positive multiple of {share.count}.",
      )
    if not mix.num_rows:
      raise ValueError("There must be at least one row.")
    if mix.num_rows < batch_size:
      remainder = "pad"
    self._arrays = dict(arrays)
    self._names = list(names)
    self._mix = mix
    self._batch_size = batch_size
    self._remainder = remainder
    size = batch_size // share.count
    self._mine = slice(share.index * size, (share.index + 1) * size)

  @property
  def num_batches_per_epoch(self) -> int:
    """Number of steps in an epoch."""
    full, rest = divmod(self._mix.num_rows, self._batch_size)
    return full + (rest > 0 and self._remainder == "pad")

  def batch(self, step: int) -> dict[str, np.ndarray]:
    """Returns this process's rows of the batch of `step`."""
    rows = self._rows(step)[self._mine]
    missing = self._mine.stop - self._mine.start - len(rows)
    return {
      name: np.pad(array[rows], [(0, missing)] + [(0, 0)] * (array.ndim - 1))
      for name, array in self._arrays.items()
    }

  def row_names(self, step: int) -> list[str]:
    """Returns the names of all processes' rows in the batch of `step`."""
    return [self._names[row] for row in self._rows(step)]

  def _rows(self, step: int) -> np.ndarray:
    epoch, number = divmod(step, self.num_batches_per_epoch)
    order = self._mix.order(epoch)
    start = number * self._batch_size
    return order[start : start + self._batch_size]

  def fingerprint(self) -> str:
    """Returns a digest of all batches, to reject resuming with other data."""
    settings = (self._mix, self._batch_size, self._remainder)
    digest = hashlib.sha256(repr(settings).encode())
    for name, array in sorted(self._arrays.items()):
      digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
      digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


class QuestionLoader:
  """Shuffled batches of questions, in the order defined for `Loader`.

  An epoch ends with the last full batch, so no question appears twice in a
  batch, unless its dataset has fewer rows than its weight requires.
  """

  def __init__(
    self, questions: Sequence[types.Question], *, mix: Mix, batch_size: int
  ) -> None:
    """Initializes the loader with the concatenated questions of all datasets.

    Raises:
      errors.DataError: if there are fewer than `batch_size`.
    """
    if mix.num_rows < batch_size:
      raise errors.DataError(
        f"batch.num_questions must be at most {mix.num_rows}, the number of "
        f"questions, got {batch_size}.",
        where=f"--config.batch.num_questions={batch_size}",
        why="No question appears twice in a batch.",
        fix=f"Set it to {mix.num_rows} or less, or add data.",
      )
    self.questions = tuple(questions)
    self._mix, self._batch_size = mix, batch_size

  def batch(self, step: int) -> list[types.Question]:
    """Returns the questions of the batch of `step`."""
    epoch, number = divmod(step, self._mix.num_rows // self._batch_size)
    start = number * self._batch_size
    rows = self._mix.order(epoch)[start : start + self._batch_size]
    return [self.questions[i] for i in rows]

  def fingerprint(self) -> str:
    """Returns a digest of all batches; see `Loader.fingerprint`.

    It excludes paraphrases, which training does not read.
    """
    settings = (self._mix, self._batch_size)
    lines = map(_trained_fields, self.questions)
    text = "\n".join((repr(settings), *lines))
    return hashlib.sha256(text.encode()).hexdigest()


def _trained_fields(question: types.Question) -> str:
  """Returns a question as JSON, without its paraphrase."""
  fields = dataclasses.asdict(question)
  del fields["paraphrase"], fields["paraphrase_answer"]
  return json.dumps(fields, ensure_ascii=False, allow_nan=False)


@functools.lru_cache(maxsize=4)
def _order(mix: Mix, epoch: int) -> np.ndarray:
  return np.random.default_rng((mix.seed, epoch)).permutation(mix._rows(epoch))
