# SPDX-License-Identifier: Apache-2.0
"""Packs examples of any length into rows of one length."""

import bisect
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from atlas_jax import errors

Example = tuple[Sequence[int] | np.ndarray, Sequence[bool] | np.ndarray]
TooLong = Literal["drop", "truncate", "error"]
_MAX_LENGTH = 16_384  # Of a row whose length is not set.


class Rows(NamedTuple):
  """Packed examples.

  Attributes:
    arrays: [rows, length] each: int32 `token_ids`, `segment_ids` and
      `positions`, and bool `loss_mask`. Segments count from 1 in each row,
      positions from 0 in each segment; padding is 0 in all arrays. Examples of
      3 and 2 tokens in a row of 7:

        token_ids    a a a b b 0 0
        segment_ids  1 1 1 2 2 0 0
        positions    0 1 2 0 1 0 0
    members: indices of the examples in each row.
    num_too_long: number of examples longer than a row.
  """

  arrays: dict[str, np.ndarray]
  members: list[list[int]]
  num_too_long: int


def check_context(length: int, max_positions: int) -> None:
  """Validates that a row does not exceed the model's context.

  Raises:
    errors.ConfigError: if it does.
  """
  if length > max_positions:
    raise errors.ConfigError(
      f"packing.length must be at most {max_positions}, got {length}.",
      where=f"--config.packing.length={length}",
      why="A conversation may fill a row, and the model's config.json has "
      f"max_position_embeddings={max_positions}.",
      fix=f"Set it to {max_positions} or less.",
    )


def row_length(length: int, max_positions: int) -> int:
  """Returns the tokens of a row.

  Args:
    length: the setting; 0 for 16,384 or the context, whichever is smaller.
    max_positions: context of the model.

  Raises:
    errors.ConfigError: if a row would exceed the context.
  """
  check_context(length, max_positions)
  return length or min(_MAX_LENGTH, max_positions)


def pack(
  examples: Sequence[Example], length: int, *, too_long: TooLong
) -> Rows:
  """Packs examples into rows by best-fit decreasing.

  `loss_mask` marks targets, which are predicted from the tokens before them. It
  is set to False on the first token of each example.

  Args:
    examples: token ids and loss mask of each.
    length: tokens in a row.
    too_long: how to handle examples longer than a row. "truncate" cuts their
      end, and drops them if no target remains.

  Raises:
    errors.DataError: if an example is too long and `too_long` is "error", or no
      example remains.
  """
  kept, num_too_long = _fit(examples, length, too_long)
  numbers = list(kept)
  bins = _bins([len(kept[i][0]) for i in numbers], length)
  members = [[numbers[i] for i in row] for row in bins]
  return Rows(_fill(kept, members, length), members, num_too_long)


def pad(examples: Sequence[Example], length: int, *, too_long: TooLong) -> Rows:
  """Puts each example into its own row; otherwise like `pack`."""
  kept, num_too_long = _fit(examples, length, too_long)
  members = [[i] for i in kept]
  return Rows(_fill(kept, members, length), members, num_too_long)


def _fit(
  examples: Sequence[Example], length: int, too_long: TooLong
) -> tuple[dict[int, Example], int]:
  """Returns the examples that fit into a row, and how many were too long."""
  if too_long not in ("drop", "truncate", "error"):
    raise ValueError(
      f'too_long must be "drop", "truncate" or "error", got {too_long!r}.'
    )
  kept: dict[int, Example] = {}
  num_too_long = 0
  for number, (token_ids, loss_mask) in enumerate(examples, start=1):
    if not 0 < len(token_ids) == len(loss_mask):
      raise ValueError(
        f"Example {number} must have as many tokens as loss mask values, and "
        f"at least one, got {len(token_ids)} and {len(loss_mask)}."
      )
    if len(token_ids) <= length:
      kept[number - 1] = (token_ids, loss_mask)
      continue
    num_too_long += 1
    if too_long == "error":
      raise errors.DataError(
        f"Example {number} is too long: {len(token_ids)} tokens, row {length}.",
        where=f"example {number} of {len(examples)}",
        why="packing.too_long is error.",
        fix="Increase packing.length, or set packing.too_long to drop or "
        "truncate.",
      )
    if too_long == "truncate" and any(loss_mask[1:length]):
      kept[number - 1] = (token_ids[:length], loss_mask[:length])
  if not kept:
    raise errors.DataError(
      "No example fits into a row.",
      where=f"{len(examples)} examples",
      why=f"{num_too_long} of them are longer than a row of {length} tokens.",
      fix="Set packing.length above the length of prompts with completions.",
    )
  return kept, num_too_long


def _bins(sizes: Sequence[int], length: int) -> list[list[int]]:
  """Assigns each index to the fullest bin that fits it, longest first."""
  bins: list[list[int]] = []
  # Sorted (free tokens, bin) of the bins that are not full.
  room: list[tuple[int, int]] = []
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
      # The first token of a segment has no context to be predicted from.
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
