# SPDX-License-Identifier: Apache-2.0
"""Training and held-out rows, with no problem on both sides."""

from collections.abc import Sequence
import hashlib
from typing import Generic, NamedTuple, TypeVar
import unicodedata

import numpy as np

from atlas_jax import errors

T = TypeVar("T")


class Item(NamedTuple, Generic[T]):
  """What was made of a row, its place, and the key of its problem."""

  where: str
  problem: bytes
  value: T


def key(problem: str) -> bytes:
  """Returns the same for texts that differ in case, space and width alone."""
  folded = unicodedata.normalize("NFKC", problem).casefold()
  return hashlib.sha256(" ".join(folded.split()).encode()).digest()[:16]


def by_fraction(
  sets: Sequence[Sequence[Item[T]]], fraction: float, seed: int
) -> tuple[list[list[Item[T]]], list[Item[T]]]:
  """Holds out a random part of the problems, with all their rows.

  Args:
    sets: one or several, which may share problems.
    fraction: of all distinct problems; at least one is held out.
    seed: decides which.

  Returns:
    What is left of each set, and what is held out of all; both shuffled.

  Raises:
    errors.DataError: if nothing would be left.
  """
  problems = list(dict.fromkeys(item.problem for rows in sets for item in rows))
  order = np.random.default_rng(seed).permutation(len(problems))
  rank = {problems[i]: place for place, i in enumerate(order)}
  num_held_out = max(1, round(fraction * len(problems)))
  if num_held_out >= len(problems):
    raise errors.DataError(
      "Too few problems are left to train on.",
      where="--config.held_out.fraction",
      why=f"There are {len(problems)} distinct problems, and {fraction} of "
      "them, at least one, is held out.",
      fix="Bring more data, or set --config.held_out.path and a fraction of 0.",
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
  """Returns those `rows` whose problem is not held out."""
  problems = {item.problem for item in held_out}
  return [item for item in rows if item.problem not in problems]
