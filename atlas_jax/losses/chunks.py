# SPDX-License-Identifier: Apache-2.0
"""Logits for one chunk of tokens at a time.

The logits of a long sequence over a large vocabulary are the biggest array of
a training step. Here they exist for one chunk of tokens at a time, and are
computed again on the way back instead of being kept.
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
      head takes its inputs in this precision and accumulates in float32.
    head_DV: the unembedding kernel. Its gradient is summed over the chunks in
      its own precision, so give it in float32 where it is kept so.
    soft_cap: c makes a logit x into c tanh(x / c), as Gemma 2 does; None is
      for models without.
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
  """Applies a function to chunks of tokens, one after the other.

  Args:
    function: of arrays [B, chunk, ...], gives a tree of arrays [B, chunk]. What
      it computes on the way is computed again in the backward pass.
    arrays: each [B, T, ...].
    chunk_tokens: tokens of each sequence in a chunk. T need not be a multiple
      of it.

  Returns:
    The tree of arrays [B, T].

  Raises:
    ValueError: if `chunk_tokens` is not positive.
  """
  if chunk_tokens < 1:
    raise ValueError(f"Expected chunk_tokens >= 1, got {chunk_tokens}.")
  num_tokens = jax.tree.leaves(arrays)[0].shape[1]
  num_chunks = -(-num_tokens // chunk_tokens)
  # Even chunks: 513 tokens by 512 become 2 x 257, not 2 x 512.
  chunk_tokens = -(-num_tokens // num_chunks)

  def split(x: jax.Array) -> jax.Array:
    """Moves chunks of tokens in front, the last one padded with zeros."""
    padding = num_chunks * chunk_tokens - num_tokens
    x = jnp.pad(x, [(0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)])
    x = x.reshape(x.shape[0], num_chunks, chunk_tokens, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  def join(x: jax.Array) -> jax.Array:
    """Undoes `split`."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, :num_tokens]

  chunks = jax.lax.map(jax.checkpoint(function), jax.tree.map(split, arrays))
  return jax.tree.map(join, chunks)
