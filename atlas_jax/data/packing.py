# SPDX-License-Identifier: Apache-2.0
"""Examples of any length to rows of one length."""

import bisect
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from atlas_jax import errors

Example = tuple[Sequence[int] | np.ndarray, Sequence[bool] | np.ndarray]
TooLong = Literal["drop", "truncate", "error"]


class Rows(NamedTuple):
  """Examples laid out.

  Attributes:
    arrays: of shape [rows, length]: int32 `token_ids`, `segment_ids` and
      `positions`, and bool `loss_mask`. Segments count from 1 in each row, and
      positions from 0 in each segment; padding is 0 in all of them.
    members: which examples are in each row.
    num_too_long: how many examples were longer than a row.
  """

  arrays: dict[str, np.ndarray]
  members: list[list[int]]
  num_too_long: int


def check_context(length: int, max_positions: int) -> None:
  """Refuses rows that can hold more of one conversation than a model can see.

  Raises:
    errors.ConfigError: if they can.
  """
  if length > max_positions:
    raise errors.ConfigError(
      f"Rows of {length} tokens are longer than the model's context.",
      where=f"--config.packing.length={length}",
      why=f"config.json has max_position_embeddings={max_positions}, and a "
      "conversation may fill a row.",
      fix=f"Set it to {max_positions} or less.",
    )


def pack(
  examples: Sequence[Example], length: int, *, too_long: TooLong
) -> Rows:
  """Packs examples into as few rows as best-fit decreasing finds.

  `loss_mask` marks targets: where it is True, the token is to be predicted from
  those before it. So it is False on the first token of every example.

  Args:
    examples: token ids and loss mask of each.
    length: tokens in a row.
    too_long: what becomes of an example longer than a row. One that is
      truncated loses its end, and goes if no target is left.

  Raises:
    errors.DataError: if an example is too long and that is an error, or none
      is left.
  """
  kept, num_too_long = _fit(examples, length, too_long)
  numbers = list(kept)
  bins = _bins([len(kept[i][0]) for i in numbers], length)
  members = [[numbers[i] for i in row] for row in bins]
  return Rows(_fill(kept, members, length), members, num_too_long)


def pad(examples: Sequence[Example], length: int, *, too_long: TooLong) -> Rows:
  """Gives every example its own row; otherwise as `pack`."""
  kept, num_too_long = _fit(examples, length, too_long)
  members = [[i] for i in kept]
  return Rows(_fill(kept, members, length), members, num_too_long)


def _fit(
  examples: Sequence[Example], length: int, too_long: TooLong
) -> tuple[dict[int, Example], int]:
  """Returns the examples that fit into a row, and how many did not at first."""
  if too_long not in ("drop", "truncate", "error"):
    raise ValueError(
      f'Expected too_long of "drop", "truncate" or "error", got {too_long!r}.'
    )
  kept: dict[int, Example] = {}
  num_too_long = 0
  for number, (token_ids, loss_mask) in enumerate(examples, start=1):
    if not 0 < len(token_ids) == len(loss_mask):
      raise ValueError(
        f"Example {number} has {len(token_ids)} tokens and a loss mask of "
        f"{len(loss_mask)}; expected as many, and at least one."
      )
    if len(token_ids) <= length:
      kept[number - 1] = (token_ids, loss_mask)
      continue
    num_too_long += 1
    if too_long == "error":
      raise errors.DataError(
        f"Example {number} is longer than a row.",
        where=f"example {number} of {len(examples)}",
        why=f"It has {len(token_ids)} tokens, and a row {length}.",
        fix="Make rows longer, or let longer examples be dropped or truncated.",
      )
    if too_long == "truncate" and any(loss_mask[1:length]):
      kept[number - 1] = (token_ids[:length], loss_mask[:length])
  if not kept:
    raise errors.DataError(
      "No example is left to train on.",
      where=f"{len(examples)} examples",
      why=f"{num_too_long} of them are longer than a row of {length} tokens.",
      fix="Make rows longer than the prompts and answers of the data.",
    )
  return kept, num_too_long


def _bins(sizes: Sequence[int], length: int) -> list[list[int]]:
  """Puts each index into the fullest bin with room for it, longest first."""
  bins: list[list[int]] = []
  room: list[tuple[int, int]] = []  # Sorted (tokens free, bin); none is full.
  for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
    place = bisect.bisect_left(room, (sizes[i], 0))
    if place == len(room):
      free, target = length, len(bins)
      bins.append([])
    else:
      free, target = room.pop(place)
    bins[target].append(i)
    if free > sizes[i]:
      bisect.insort(room, (free - sizes[i], target))
  return bins


def _fill(
  examples: Mapping[int, Example],
  bins: Sequence[Sequence[int]],
  length: int,
) -> dict[str, np.ndarray]:
  shape = (len(bins), length)
  token_ids = np.zeros(shape, np.int32)
  loss_mask = np.zeros(shape, np.bool_)
  segment_ids = np.zeros(shape, np.int32)
  positions = np.zeros(shape, np.int32)
  for row, indices in enumerate(bins):
    start = 0
    for segment, i in enumerate(indices, start=1):
      ids, mask = examples[i]
      span = slice(start, start + len(ids))
      token_ids[row, span] = ids
      loss_mask[row, span] = mask
      # Nothing in its segment comes before it, to predict it from.
      loss_mask[row, start] = False
      segment_ids[row, span] = segment
      positions[row, span] = np.arange(len(ids))
      start += len(ids)
  return {
    "token_ids": token_ids,
    "loss_mask": loss_mask,
    "segment_ids": segment_ids,
    "positions": positions,
  }
