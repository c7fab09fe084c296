# SPDX-License-Identifier: Apache-2.0
"""Computes logits for one chunk of tokens at a time.

The logits of a long sequence over a large vocabulary are the largest array of a
training step. Only those of one chunk exist at a time; they are recomputed in
the backward pass instead of being saved.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")


def project(
  hidden_BTD: jax.Array, head_DV: jax.Array, *, soft_cap: float | None
) -> jax.Array:
  """Computes float32 logits, [B, T, V].

  Args:
    hidden_BTD: final hidden states, after the last norm. The product with the
      head takes inputs of this dtype and accumulates in float32.
    head_DV: the unembedding kernel. Its gradient is summed over chunks in its
      own dtype, so pass float32 parameters without a cast.
    soft_cap: maps a logit x to c tanh(x / c), as in Gemma 2; None for none.
  """
  logits_BTV = jnp.einsum(
    "BTD,DV->BTV",
    hidden_BTD,
    head_DV.astype(hidden_BTD.dtype),
    preferred_element_type=jnp.float32,
  )
  if soft_cap is not None:
    logits_BTV = soft_cap * jnp.tanh(logits_BTV / soft_cap)
  return logits_BTV


def map_tokens(
  function: Callable[[Any], T],
  arrays: Any,  # Any: a pytree of arrays.
  *,
  chunk_tokens: int,
) -> T:
  """Applies a function to one chunk of tokens after another.

  Args:
    function: maps arrays [B, chunk, ...] to a tree of arrays [B, chunk]. Its
      intermediate results are recomputed in the backward pass.
    arrays: each [B, T, ...].
    chunk_tokens: tokens of each sequence in a chunk; need not divide T.

  Returns:
    The tree of arrays [B, T].

  Raises:
    ValueError: if `chunk_tokens` is not positive.
  """
  if chunk_tokens < 1:
    raise ValueError(f"chunk_tokens must be >= 1, got {chunk_tokens}.")
  num_tokens = jax.tree.leaves(arrays)[0].shape[1]
  num_chunks = -(-num_tokens // chunk_tokens)
  # Chunks of equal size: 513 tokens by 512 become 2 x 257, not 2 x 512.
  chunk_tokens = -(-num_tokens // num_chunks)

  def split(x: jax.Array) -> jax.Array:
    """Pads and splits T: [B, T, ...] -> [chunks, B, chunk, ...]."""
    padding = num_chunks * chunk_tokens - num_tokens
    x = jnp.pad(x, [(0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)])
    x = x.reshape(x.shape[0], num_chunks, chunk_tokens, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  def join(x: jax.Array) -> jax.Array:
    """Inverts `split`: [chunks, B, chunk] -> [B, T]."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, :num_tokens]

  chunks = jax.lax.map(jax.checkpoint(function), jax.tree.map(split, arrays))
  return jax.tree.map(join, chunks)
