# SPDX-License-Identifier: Apache-2.0
"""Splits rows into training and held-out sets that share no problem."""

from collections.abc import Sequence
import hashlib
from typing import Generic, NamedTuple, TypeVar
import unicodedata

import numpy as np

from atlas_jax import errors

T = TypeVar("T")


class Item(NamedTuple, Generic[T]):
  """A value derived from a row, with its location and problem key."""

  where: str
  problem: bytes
  value: T


def key(problem: str) -> bytes:
  """Returns a key that ignores case, whitespace and character width."""
  folded = unicodedata.normalize("NFKC", problem).casefold()
  return hashlib.sha256(" ".join(folded.split()).encode()).digest()[:16]


def by_fraction(
  sets: Sequence[Sequence[Item[T]]], fraction: float, seed: int
) -> tuple[list[list[Item[T]]], list[Item[T]]]:
  """Holds out a random fraction of the problems, with all their rows.

  Args:
    sets: datasets, which may share problems.
    fraction: of all distinct problems; at least one is held out.
    seed: selects the problems.

  Returns:
    The remaining rows of each dataset, and the held-out rows of all; both
    shuffled.

  Raises:
    errors.DataError: if no problem would remain.
  """
  problems = list(dict.fromkeys(item.problem for rows in sets for item in rows))
  order = np.random.default_rng(seed).permutation(len(problems))
  rank = {problems[i]: place for place, i in enumerate(order)}
  num_held_out = max(1, round(fraction * len(problems)))
  if num_held_out >= len(problems):
    raise errors.DataError(
      "No problem is left to train on.",
      where="--config.held_out.fraction",
      why=f"There are {len(problems)} distinct problems; a fraction of "
      f"{fraction}, and at least one, is held out.",
      fix="Add data, or set --config.held_out.path and a fraction of 0.",
    )
  shuffled = [sorted(rows, key=lambda row: rank[row.problem]) for rows in sets]
  left = [
    [row for row in rows if rank[row.problem] >= num_held_out]
    for rows in shuffled
  ]
  held_out = [
    row for rows in shuffled for row in rows if rank[row.problem] < num_held_out
  ]
  return left, sorted(held_out, key=lambda row: rank[row.problem])


def without(
  rows: Sequence[Item[T]], held_out: Sequence[Item[T]]
) -> list[Item[T]]:
  """Returns the rows whose problem is not held out."""
  problems = {item.problem for item in held_out}
  return [item for item in rows if item.problem not in problems]
