# SPDX-License-Identifier: Apache-2.0
"""Rollouts as rows of token batches: the very tokens that were sampled."""

from collections.abc import Sequence
import heapq
from typing import Any, NamedTuple

import jax
import numpy as np

from atlas_jax import types

_LENGTH_MULTIPLE = 32
_NO_PLACE = -1


class Part(NamedTuple):
  """The rollouts of one update.

  Attributes:
    batch: rows of packed sequences: `token_ids`, `positions` and `segment_ids`
      int32[R, T], as `data.packing` has them. Of completions, in an order of
      their own: `places` int32[B, C], where in the scores [R, T - 1] of a
      microbatch each token has its own, as `gather_scores` reads it;
      `loss_mask` bool[B, C], True where there is a token; `rollout_logprobs`
      float32[B, C].
    members: pairs of a rollout and its row in `places`. The other rows are
      padding that counts for nothing.
    num_microbatches: row i, of either kind, is in microbatch i % this.
  """

  batch: dict[str, Any]  # Any: arrays of NumPy or of JAX.
  members: list[tuple[int, int]]
  num_microbatches: int


def lay_out(
  rollouts: Sequence[types.Rollout],
  *,
  num_minibatches: int,
  num_shards: int,
  max_completion_tokens: int,
  length: int,
  packed: bool,
  per_device: int,
) -> list[Part]:
  """Lays rollouts out in parts of one shape, one for each update.

  Rollouts are dealt out to the parts in turn. Within one, the longest goes
  first, and each to the emptiest row: so rows, and with them devices and
  microbatches, have about as many tokens. Rows are as few as it takes, rounded
  up by a quarter at most so that few shapes are compiled.

  Args:
    rollouts: at least one.
    num_minibatches: updates; no more are made than there are rollouts.
    num_shards: devices that see different rows.
    max_completion_tokens: the longest completion there may be.
    length: tokens of a row; more where one sequence has more.
    packed: whether rows hold several sequences.
    per_device: rows that a device sees at once; 0 for all it has.
  """
  sizes = [_size(rollout) for rollout in rollouts]
  length = -(-max(length, *sizes) // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
  parts = [
    list(range(i, len(rollouts), num_minibatches))
    for i in range(min(num_minibatches, len(rollouts)))
  ]
  needed = [
    [(sizes[i] if packed else length, i) for i in members] for members in parts
  ]
  dealt, times = _deal_parts(needed, length, num_shards * max(per_device, 1))
  num_microbatches = times if per_device else 1
  num_places = num_shards
  most = max(
    sum(map(len, rows[i::num_microbatches]))
    for rows in dealt
    for i in range(num_microbatches)
  )
  while num_places < most:
    num_places *= 2
  return [
    _fill(
      rollouts,
      rows,
      length=length,
      num_microbatches=num_microbatches,
      shape=(num_places * num_microbatches, max_completion_tokens),
    )
    for rows in dealt
  ]


def gather_scores(
  scores_RT: jax.Array, places_BC: jax.Array, *, num_microbatches: int
) -> jax.Array:
  """Takes the scores of completions out of those of packed rows.

  Args:
    scores_RT: of every token but the first of each row.
    places_BC: see `Part`.
    num_microbatches: how many there are in these rows.

  Returns:
    The scores [B, C]; where there is no token, anything.
  """

  def split(x: jax.Array) -> jax.Array:
    return x.reshape(-1, num_microbatches, x.shape[1]).swapaxes(0, 1)

  scores = split(scores_RT).reshape(num_microbatches, -1)
  taken = jax.vmap(lambda of_part, places: of_part[places])(
    scores, split(places_BC)
  )
  return taken.swapaxes(0, 1).reshape(places_BC.shape)


def make_tokens(
  pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, multiple: int
) -> dict[str, np.ndarray]:
  """Lays prompts and their completions out, each in a row of its own.

  Args:
    pairs: a prompt and its completion.
    multiple: the number of rows is rounded up to a power of two times this,
      and that of tokens to a multiple of 32, so that few shapes are compiled.

  Returns:
    `token_ids`, `positions` and `segment_ids` int32[B, T].
  """
  longest = max(len(prompt) + len(completion) for prompt, completion in pairs)
  length = -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
  num_rows = multiple
  while num_rows < len(pairs):
    num_rows *= 2
  batch = _empty(num_rows, length)
  for row, pair in enumerate(pairs):
    _write(batch, row, 0, 1, *pair)
  return batch


class Written(NamedTuple):
  """A prompt, its completion, and the log-probabilities of the latter."""

  prompt: Sequence[int] | np.ndarray
  completion: Sequence[int] | np.ndarray
  logprobs: Sequence[float] | np.ndarray


def pack_rows(
  written: Sequence[Written],
  *,
  num_shards: int,
  length: int,
  packed: bool,
  per_device: int,
) -> tuple[dict[str, np.ndarray], int]:
  """Lays completions out as `lay_out` does, for what looks at whole rows.

  Args:
    written: at least one.
    num_shards: see `lay_out`; the rest likewise.
    length: see above.
    packed: see above.
    per_device: see above.

  Returns:
    A batch as `data.packing` has them, whose `loss_mask` is True on
    completions, with their `rollout_logprobs`, float32[R, T]; and the number of
    microbatches: row i is in microbatch i % it.
  """
  sizes = [len(w.prompt) + len(w.completion) for w in written]
  length = -(-max(length, *sizes) // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
  needed = [(size if packed else length, i) for i, size in enumerate(sizes)]
  (dealt,), times = _deal_parts(
    [needed], length, num_shards * max(per_device, 1)
  )
  batch = _empty(len(dealt), length)
  batch["loss_mask"] = np.zeros((len(dealt), length), bool)
  batch["rollout_logprobs"] = np.zeros((len(dealt), length), np.float32)
  for row, indices in enumerate(dealt):
    end = 0
    for segment, i in enumerate(indices, start=1):
      prompt, completion, logprobs = written[i]
      _write(batch, row, end, segment, prompt, completion)
      start, end = end, end + sizes[i]
      batch["loss_mask"][row, start + len(prompt) : end] = True
      batch["rollout_logprobs"][row, start + len(prompt) : end] = logprobs
      # Nothing comes before the first token of a sequence, to predict it from.
      batch["loss_mask"][row, start] = False
  return batch, times if per_device else 1


def _deal_parts(
  parts: Sequence[Sequence[tuple[int, int]]], length: int, multiple: int
) -> tuple[list[list[list[int]]], int]:
  """Deals every part out to as few rows as it takes.

  Returns:
    The rows of each part, and by what their number is a multiple of `multiple`.
  """
  dealt, times = None, 0
  while dealt is None:
    times = _next(times)
    dealt = _deal_all(parts, multiple * times, length)
  return dealt, times


def _deal_all(
  parts: Sequence[Sequence[tuple[int, int]]], num_rows: int, length: int
) -> list[list[list[int]]] | None:
  """Deals every part out to as many rows; None if one of them has no room."""
  dealt = []
  for sequences in parts:
    rows = _deal(sequences, num_rows, length)
    if rows is None:
      return None
    dealt.append(rows)
  return dealt


def _deal(
  sequences: Sequence[tuple[int, int]], num_rows: int, length: int
) -> list[list[int]] | None:
  """Deals (tokens, rollout) out to rows; None if one has no room."""
  rows: list[list[int]] = [[] for _ in range(num_rows)]
  used = [(0, row) for row in range(num_rows)]  # A heap.
  for size, i in sorted(sequences, key=lambda pair: -pair[0]):
    tokens, row = used[0]
    if tokens + size > length:
      return None
    heapq.heapreplace(used, (tokens + size, row))
    rows[row].append(i)
  return rows


def _next(count: int) -> int:
  """Gives the next of the numbers with three binary digits, then zeros."""
  return count + max(1, (1 << count.bit_length()) // 8)


def _fill(
  rollouts: Sequence[types.Rollout],
  rows: Sequence[Sequence[int]],
  *,
  length: int,
  num_microbatches: int,
  shape: tuple[int, int],
) -> Part:
  """Writes one part, whose completions have `shape`."""
  batch = _empty(len(rows), length)
  batch["places"] = np.full(shape, _NO_PLACE, np.int32)
  batch["loss_mask"] = np.zeros(shape, bool)
  batch["rollout_logprobs"] = np.zeros(shape, np.float32)
  members = []
  num_taken = [0] * num_microbatches
  for row, indices in enumerate(rows):
    microbatch, start = row % num_microbatches, 0
    for segment, i in enumerate(indices, start=1):
      prompt, completion = rollouts[i].prompt, rollouts[i].completion
      _write(
        *(batch, row, start, segment),
        *(prompt.token_ids, completion.token_ids),
      )
      at = num_taken[microbatch] * num_microbatches + microbatch
      num_taken[microbatch] += 1
      members.append((i, at))
      # Nothing comes before the first token of a sequence, to score it from.
      first = 0 if prompt.token_ids else 1
      span = slice(first, len(completion.token_ids))
      above = (row // num_microbatches) * (length - 1)
      begin = above + start + len(prompt.token_ids) - 1
      batch["places"][at, span] = begin + np.arange(span.start, span.stop)
      batch["loss_mask"][at, span] = True
      batch["rollout_logprobs"][at, span] = completion.logprobs[span]
      start += _size(rollouts[i])
  return Part(batch, members, num_microbatches)


def _empty(num_rows: int, length: int) -> dict[str, np.ndarray]:
  names = ("token_ids", "positions", "segment_ids")
  return {name: np.zeros((num_rows, length), np.int32) for name in names}


def _write(
  batch: dict[str, np.ndarray],
  row: int,
  start: int,
  segment: int,
  prompt: Sequence[int] | np.ndarray,
  completion: Sequence[int] | np.ndarray,
) -> None:
  """Writes one sequence into a row, from `start` on."""
  size = len(prompt) + len(completion)
  span = slice(start, start + size)
  batch["token_ids"][row, span] = (*prompt, *completion)
  batch["positions"][row, span] = np.arange(size)
  batch["segment_ids"][row, span] = segment


def _size(rollout: types.Rollout) -> int:
  return len(rollout.prompt.token_ids) + len(rollout.completion.token_ids)
