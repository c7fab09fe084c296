# SPDX-License-Identifier: Apache-2.0
"""Packs rollouts into token batches, exactly as they were sampled.

R rows of T tokens hold B completions of up to C tokens, in M microbatches. Row
r is row r // M of microbatch r % M; completion b is in microbatch b % M. The
scores [R / M, T - 1] of a microbatch are flattened, and `places` int32[B, C]
holds the flat index of each completion token's score. A row's first token has
no score, so token t is in column t - 1. For token c of a completion after
`num_prompt` prompt tokens, in a sequence that starts at token `start` of row r:

  places[b, c] = (r // M) * (T - 1) + (start + num_prompt + c) - 1

With M = 2, R = 4, T = 6 (p prompt, c completion, . padding):

  row 0  p p c c p c   microbatch 0, row 0 of 2
  row 1  p c c p p c   microbatch 1, row 0 of 2
  row 2  p p p c c .   microbatch 0, row 1 of 2
  row 3  p c . . . .   microbatch 1, row 1 of 2

  scores of microbatch 0     p c c p c | p p c c .
  flat index                 0 1 2 3 4 | 5 6 7 8 9
  places[[0, 2, 4]], C = 2   [1 2] [4 -] [7 8]
"""

from collections.abc import Sequence
import heapq
from typing import Any, NamedTuple

import jax
import numpy as np

from atlas_jax import types

# A number of tokens, and the index of the sequence that needs them.
_Sized = tuple[int, int]

_LENGTH_MULTIPLE = 32
_NO_PLACE = -1


class Part(NamedTuple):
  """The rollouts of one update, in the layout described above.

  Attributes:
    batch: `token_ids`, `positions` and `segment_ids` int32[R, T], as in
      `data.packing`; per completion, `places` int32[B, C], -1 without a token,
      `loss_mask` bool[B, C], True for tokens that have a score, and
      `rollout_logprobs` float32[B, C].
    members: pairs (rollout, b) of an index into the rollouts and the row of its
      completion in `places`. The other rows of `places` are padding.
    num_microbatches: M.
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
  """Packs rollouts into parts of the same shape, one per update.

  Rollout i goes to part i % num_minibatches. Within a part, rollouts are placed
  longest first, each in the row with the fewest tokens, so that rows, devices
  and microbatches have similar token counts. The number of rows is the smallest
  that fits, rounded up by at most a quarter to limit the compiled shapes.

  Args:
    rollouts: at least one.
    num_minibatches: number of updates; at most one per rollout.
    num_shards: number of devices with different rows.
    max_completion_tokens: C.
    length: minimum T; raised to the longest sequence, then to a multiple of 32.
    packed: whether a row may hold several sequences.
    per_device: rows per device and microbatch; 0 for a single microbatch.
  """
  sizes = [_num_tokens(rollout) for rollout in rollouts]
  length = _round_up_length(max(length, *sizes))
  parts = [
    [
      (sizes[i] if packed else length, i)
      for i in range(first, len(rollouts), num_minibatches)
    ]
    for first in range(min(num_minibatches, len(rollouts)))
  ]
  packed_parts, factor = _pack_parts(
    parts, length, num_shards * max(per_device, 1)
  )
  num_microbatches = factor if per_device else 1
  max_completions = max(
    sum(map(len, rows[m::num_microbatches]))
    for rows in packed_parts
    for m in range(num_microbatches)
  )
  num_places = num_microbatches * _round_up_count(max_completions, num_shards)
  return [
    _write_part(
      rollouts,
      rows,
      length=length,
      num_microbatches=num_microbatches,
      shape=(num_places, max_completion_tokens),
    )
    for rows in packed_parts
  ]


def gather_scores(
  scores_RT: jax.Array, places_BC: jax.Array, *, num_microbatches: int
) -> jax.Array:
  """Gathers the scores of completions from those of packed rows.

  Args:
    scores_RT: scores [R, T - 1] of all tokens but the first of each row.
    places_BC: see `Part`.
    num_microbatches: M; 1 for the rows of a single microbatch.

  Returns:
    The scores [B, C]; arbitrary values at positions without a token.
  """

  def split(x: jax.Array) -> jax.Array:
    return x.reshape(-1, num_microbatches, x.shape[1]).swapaxes(0, 1)

  # [M, R / M * (T - 1)] indexed by [M, B / M, C].
  flat = split(scores_RT).reshape(num_microbatches, -1)
  gathered = jax.vmap(lambda scores, places: scores[places])(
    flat, split(places_BC)
  )
  return gathered.swapaxes(0, 1).reshape(places_BC.shape)


def make_tokens(
  pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, multiple: int
) -> dict[str, np.ndarray]:
  """Returns a batch with one prompt and its completion per row.

  The number of rows is rounded up to `multiple` times a power of two, and that
  of tokens to a multiple of 32, to limit the number of compiled shapes.

  Args:
    pairs: prompts with their completions.
    multiple: see above.

  Returns:
    `token_ids`, `positions` and `segment_ids` int32[B, T].
  """
  longest = max(len(prompt) + len(completion) for prompt, completion in pairs)
  batch = _zeros(
    _round_up_count(len(pairs), multiple), _round_up_length(longest)
  )
  for row, (prompt, completion) in enumerate(pairs):
    _write_sequence(batch, row, 0, 1, prompt, completion)
  return batch


class Written(NamedTuple):
  """A prompt, and its completion with log-probabilities."""

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
  """Packs completions as `lay_out` does, with per-token arrays over rows.

  Args:
    written: at least one.
    num_shards: see `lay_out`.
    length: see `lay_out`.
    packed: see `lay_out`.
    per_device: see `lay_out`.

  Returns:
    A batch as in `data.packing`, whose `loss_mask` is True on completions, with
    their `rollout_logprobs` float32[R, T]; and the number of microbatches M,
    where row r is in microbatch r % M.
  """
  sizes = [len(w.prompt) + len(w.completion) for w in written]
  length = _round_up_length(max(length, *sizes))
  part = [(size if packed else length, i) for i, size in enumerate(sizes)]
  (rows,), factor = _pack_parts([part], length, num_shards * max(per_device, 1))
  batch = _zeros(len(rows), length)
  batch["loss_mask"] = np.zeros((len(rows), length), bool)
  batch["rollout_logprobs"] = np.zeros((len(rows), length), np.float32)
  for row, indices in enumerate(rows):
    end = 0
    for segment, i in enumerate(indices, start=1):
      prompt, completion, logprobs = written[i]
      _write_sequence(batch, row, end, segment, prompt, completion)
      start, end = end, end + sizes[i]
      batch["loss_mask"][row, start + len(prompt) : end] = True
      batch["rollout_logprobs"][row, start + len(prompt) : end] = logprobs
      # No token predicts the first token of a sequence.
      batch["loss_mask"][row, start] = False
  return batch, factor if per_device else 1


def _pack_parts(
  parts: Sequence[Sequence[_Sized]], length: int, multiple: int
) -> tuple[list[list[list[int]]], int]:
  """Packs every part into the same, smallest sufficient number of rows.

  Returns:
    The indices in each row of each part, and the number of rows divided by
    `multiple`.
  """
  packed_parts, factor = None, 0
  while packed_parts is None:
    factor = _next_factor(factor)
    packed_parts = _pack_into(parts, multiple * factor, length)
  return packed_parts, factor


def _pack_into(
  parts: Sequence[Sequence[_Sized]], num_rows: int, length: int
) -> list[list[list[int]]] | None:
  """Packs every part into `num_rows` rows; None if one does not fit."""
  packed_parts = []
  for part in parts:
    rows = _pack_part(part, num_rows, length)
    if rows is None:
      return None
    packed_parts.append(rows)
  return packed_parts


def _pack_part(
  part: Sequence[_Sized], num_rows: int, length: int
) -> list[list[int]] | None:
  """Packs longest first, into the emptiest row; None if one does not fit."""
  rows: list[list[int]] = [[] for _ in range(num_rows)]
  used = [(0, row) for row in range(num_rows)]  # A heap.
  for size, i in sorted(part, key=lambda sized: -sized[0]):
    num_used, row = used[0]
    if num_used + size > length:
      return None
    heapq.heapreplace(used, (num_used + size, row))
    rows[row].append(i)
  return rows


def _next_factor(factor: int) -> int:
  """Returns the next integer of the form k 2^n with k < 8: 7, 8, 10, 12, 14."""
  return factor + max(1, (1 << factor.bit_length()) // 8)


def _round_up_length(length: int) -> int:
  return -(-length // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE


def _round_up_count(count: int, multiple: int) -> int:
  """Rounds up to `multiple` times a power of two."""
  rounded = multiple
  while rounded < count:
    rounded *= 2
  return rounded


def _write_part(
  rollouts: Sequence[types.Rollout],
  rows: Sequence[Sequence[int]],
  *,
  length: int,
  num_microbatches: int,
  shape: tuple[int, int],
) -> Part:
  """Builds a part from the rollouts of each row; `shape` is (B, C)."""
  batch = _zeros(len(rows), length)
  batch["places"] = np.full(shape, _NO_PLACE, np.int32)
  batch["loss_mask"] = np.zeros(shape, bool)
  batch["rollout_logprobs"] = np.zeros(shape, np.float32)
  members = []
  num_written = [0] * num_microbatches
  for row, indices in enumerate(rows):
    microbatch, start = row % num_microbatches, 0
    for segment, i in enumerate(indices, start=1):
      prompt, completion = rollouts[i].prompt, rollouts[i].completion
      _write_sequence(
        batch, row, start, segment, prompt.token_ids, completion.token_ids
      )
      # The k-th completion of microbatch m is in row b = k M + m.
      b = num_written[microbatch] * num_microbatches + microbatch
      num_written[microbatch] += 1
      members.append((i, b))
      # No token predicts the first token of a sequence.
      first = 0 if prompt.token_ids else 1
      span = slice(first, len(completion.token_ids))
      # (r // M) * (T - 1) + (start + num_prompt + c) - 1, as at the top.
      row_offset = (row // num_microbatches) * (length - 1)
      offset = row_offset + start + len(prompt.token_ids) - 1
      batch["places"][b, span] = offset + np.arange(span.start, span.stop)
      batch["loss_mask"][b, span] = True
      batch["rollout_logprobs"][b, span] = completion.logprobs[span]
      start += _num_tokens(rollouts[i])
  return Part(batch, members, num_microbatches)


def _zeros(num_rows: int, length: int) -> dict[str, np.ndarray]:
  names = ("token_ids", "positions", "segment_ids")
  return {name: np.zeros((num_rows, length), np.int32) for name in names}


def _write_sequence(
  batch: dict[str, np.ndarray],
  row: int,
  start: int,
  segment: int,
  prompt: Sequence[int] | np.ndarray,
  completion: Sequence[int] | np.ndarray,
) -> None:
  """Writes one sequence into a row, starting at token `start`."""
  size = len(prompt) + len(completion)
  span = slice(start, start + size)
  batch["token_ids"][row, span] = (*prompt, *completion)
  batch["positions"][row, span] = np.arange(size)
  batch["segment_ids"][row, span] = segment


def _num_tokens(rollout: types.Rollout) -> int:
  return len(rollout.prompt.token_ids) + len(rollout.completion.token_ids)
