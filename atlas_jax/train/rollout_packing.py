# SPDX-License-Identifier: Apache-2.0
"""Packs rollouts into token batches, exactly as they were sampled.

A batch has M microbatches of R rows of T tokens, a shape of `batch_shapes`. Its
B completions have up to C tokens. Only the first `num_used` microbatches have
tokens, and only these are computed.

Row r is row r // M of microbatch r % M. The scores [R, T - 1] of all
microbatches are numbered in order, and `places` int32[B, C] holds the number of
each completion token's score. A row's first token has no score, so token t is
in column t - 1. For token c of a completion after `num_prompt` prompt tokens,
in a sequence that starts at token `start` of row r:

  places[b, c] = (r % M R + r // M) (T - 1) + (start + num_prompt + c) - 1

With M = 3, R = 2, T = 6 and num_used = 2 (p prompt, c completion, . padding):

  row 0  p p c c p c   microbatch 0, row 0      scores 0 to 4
  row 1  p c c p p c   microbatch 1, row 0      scores 10 to 14
  row 2  . . . . . .   microbatch 2, not used
  row 3  p p p c c .   microbatch 0, row 1      scores 5 to 9
  row 4  p c . . . .   microbatch 1, row 1      scores 15 to 19
  row 5  . . . . . .   microbatch 2, not used

  completions of row 0: places [1, 2] and [4, -]; of row 3: [7, 8]
"""

from collections.abc import Sequence
import heapq
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax import types
from atlas_jax.train import batch_shapes

_NO_PLACE = -1


class Part(NamedTuple):
  """The sequences of one update, in the layout described above.

  Attributes:
    batch: `token_ids`, `positions` and `segment_ids` int32[M R, T], as in
      `data.packing`; and, from `lay_out`, `completions`: `places` int32[B, C],
      -1 without a score, and `rollout_logprobs` float32[B, C].
    indices: of its sequences among those of the step; the first is in row 0 of
      `places`. Rows of `places` beyond them are padding.
    num_microbatches: M.
    num_used: the number of leading microbatches with tokens.
  """

  batch: dict[str, Any]  # Any: arrays of NumPy or of JAX.
  indices: range
  num_microbatches: int
  num_used: int

  @property
  def num_computed(self) -> int:
    """The number of tokens, with padding, of the used microbatches."""
    size = self.batch["token_ids"].size
    return size // self.num_microbatches * self.num_used


class Written(NamedTuple):
  """A prompt, and its completion with log-probabilities."""

  prompt: Sequence[int] | np.ndarray
  completion: Sequence[int] | np.ndarray
  logprobs: Sequence[float] | np.ndarray


def lay_out(
  rollouts: Sequence[types.Rollout],
  layout: batch_shapes.Layout,
  *,
  max_completion_tokens: int,
) -> list[Part]:
  """Packs the rollouts of a step into parts, one per update.

  Rollout i goes to part i % num_minibatches. Within a part, rollouts are placed
  longest first, each in the row with the fewest tokens, so that rows, devices
  and microbatches have similar token counts, in the fewest microbatches.

  Args:
    rollouts: at least one.
    layout: the shapes.
    max_completion_tokens: C.
  """
  written = [
    Written(r.prompt.token_ids, r.completion.token_ids, r.completion.logprobs)
    for r in rollouts
  ]
  num_parts = min(layout.num_minibatches, len(written))
  return [
    _lay_out_part(
      written, range(i, len(written), num_parts), layout, max_completion_tokens
    )
    for i in range(num_parts)
  ]


def gather_scores(
  scores_RT: jax.Array, places_BC: jax.Array, microbatch: jax.Array | int
) -> tuple[jax.Array, jax.Array]:
  """Gathers the scores of completions from those of packed rows.

  Args:
    scores_RT: scores [R, T - 1] of all tokens but the first of each row.
    places_BC: see `Part`.
    microbatch: the number of the microbatch that the rows are of.

  Returns:
    The scores [B, C], and a mask bool[B, C] of the tokens in the microbatch;
    the scores of other tokens are 0.
  """
  size = scores_RT.size
  places_BC = places_BC - microbatch * size
  is_here_BC = (places_BC >= 0) & (places_BC < size)
  # Places out of bounds get no gradient. At a place within, all those of other
  # microbatches would be added up one after the other.
  places_BC = jnp.where(is_here_BC, places_BC, size)
  flat = scores_RT.ravel()
  return flat.at[places_BC].get(mode="fill", fill_value=0), is_here_BC


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
  num_rows = multiple
  while num_rows < len(pairs):
    num_rows *= 2
  batch = _zeros(num_rows, batch_shapes.round_length(longest))
  for row, (prompt, completion) in enumerate(pairs):
    _write_sequence(batch, row, 0, 1, prompt, completion)
  return batch


def pack_rows(written: Sequence[Written], layout: batch_shapes.Layout) -> Part:
  """Packs completions as `lay_out` does, with per-token arrays over rows.

  Args:
    written: at least one.
    layout: the shapes, for a single minibatch.

  Returns:
    A part whose batch is as in `data.packing`, with a `loss_mask` that is True
    on completions, and their `rollout_logprobs` float32[M R, T].
  """
  batch, starts, shape, num_used = _pack(written, layout)
  size = batch["token_ids"].shape
  batch["loss_mask"] = np.zeros(size, bool)
  batch["rollout_logprobs"] = np.zeros(size, np.float32)
  for (prompt, completion, logprobs), (row, start) in zip(
    written, starts, strict=True
  ):
    first = start + len(prompt)
    span = slice(first, first + len(completion))
    batch["loss_mask"][row, span] = True
    batch["rollout_logprobs"][row, span] = logprobs
    # No token predicts the first token of a sequence.
    batch["loss_mask"][row, start] = False
  return Part(batch, range(len(written)), shape.num_microbatches, num_used)


def _lay_out_part(
  written: Sequence[Written],
  indices: range,
  layout: batch_shapes.Layout,
  max_completion_tokens: int,
) -> Part:
  """Packs the sequences of one update."""
  chosen = [written[i] for i in indices]
  batch, starts, shape, num_used = _pack(chosen, layout)
  size = (layout.num_completions, max_completion_tokens)
  places = np.full(size, _NO_PLACE, np.int32)
  rollout_logprobs = np.zeros(size, np.float32)
  for b, (row, start) in enumerate(starts):
    prompt, completion, logprobs = chosen[b]
    # No token predicts the first token of a sequence.
    span = np.arange(0 if len(prompt) else 1, len(completion))
    # (r % M R + r // M) (T - 1) + (start + num_prompt + c) - 1, as at the top.
    column, number = divmod(row, shape.num_microbatches)
    offset = (number * shape.num_rows + column) * (shape.length - 1)
    places[b, span] = offset + start + len(prompt) + span - 1
    rollout_logprobs[b, span] = np.asarray(logprobs)[span]
  batch["completions"] = {
    "places": places,
    "rollout_logprobs": rollout_logprobs,
  }
  return Part(batch, indices, shape.num_microbatches, num_used)


def _pack(
  written: Sequence[Written], layout: batch_shapes.Layout
) -> tuple[dict[str, Any], list[tuple[int, int]], batch_shapes.Shape, int]:
  """Writes sequences to the rows of the smallest sufficient shape.

  Returns:
    The batch, the row and first token of each sequence, the shape, and the
    number of used microbatches.
  """
  sizes = [len(w.prompt) + len(w.completion) for w in written]
  fitting = [s for s in layout.menu if s.length >= max(sizes)]
  if not fitting or len(sizes) > layout.num_completions:
    raise ValueError(
      f"{len(sizes)} sequences of up to {max(sizes)} tokens exceed {layout}."
    )
  shape = fitting[0]
  needed = sizes if layout.packed else [shape.length] * len(sizes)
  rows, num_used = _assign(needed, shape)
  batch = _zeros(shape.num_rows * shape.num_microbatches, shape.length)
  starts = [(0, 0)] * len(sizes)
  for number, indices in enumerate(rows):
    column, microbatch = divmod(number, num_used)
    row, start = column * shape.num_microbatches + microbatch, 0
    for segment, i in enumerate(indices, start=1):
      _write_sequence(
        batch, row, start, segment, written[i].prompt, written[i].completion
      )
      starts[i] = row, start
      start += sizes[i]
  return batch, starts, shape, num_used


def _assign(
  sizes: Sequence[int], shape: batch_shapes.Shape
) -> tuple[list[list[int]], int]:
  """Returns the sequences of each row of the fewest sufficient microbatches."""
  rows, num_used = None, -(-sum(sizes) // (shape.num_rows * shape.length)) - 1
  while rows is None:
    num_used += 1
    rows = _fill(sizes, num_used * shape.num_rows, shape.length)
  return rows, num_used


def _fill(
  sizes: Sequence[int], num_rows: int, length: int
) -> list[list[int]] | None:
  """Packs longest first, into the emptiest row; None if one does not fit."""
  rows: list[list[int]] = [[] for _ in range(num_rows)]
  used = [(0, row) for row in range(num_rows)]  # A heap.
  for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
    num_used, row = used[0]
    if num_used + sizes[i] > length:
      return None
    heapq.heapreplace(used, (num_used + sizes[i], row))
    rows[row].append(i)
  return rows


def _zeros(num_rows: int, length: int) -> dict[str, Any]:  # Any: NumPy arrays.
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
