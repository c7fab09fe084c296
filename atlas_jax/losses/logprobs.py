# SPDX-License-Identifier: Apache-2.0
"""Log-probability and entropy of given tokens, chunked over the sequence.

The logits of a long sequence over a large vocabulary are the biggest array of
a training step. Here they exist for one chunk of tokens at a time, and are
computed again on the way back instead of being kept.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class TokenStats(NamedTuple):
  """What a loss needs to know of each token's distribution, [B, T].

  The first three are float32, in nats, and of the distribution after the
  temperature. `log_normalizer` is the log-sum-exp of the logits. `is_likeliest`
  is bool: whether no other token is likelier.
  """

  logprobs: jax.Array
  entropy: jax.Array
  log_normalizer: jax.Array
  is_likeliest: jax.Array


def from_logits(
  logits_BTV: jax.Array, targets_BT: jax.Array, *, temperature: float
) -> TokenStats:
  """Computes the log-probability and entropy of tokens from whole logits.

  Args:
    logits_BTV: float logits of any precision; computed in float32.
    targets_BT: the token that each position predicts; the caller shifts.
    temperature: divides the logits, as it did when the tokens were sampled.

  Returns:
    The statistics, with gradients through the first three.

  Raises:
    ValueError: if `temperature` is not positive.
  """
  if temperature <= 0.0:
    raise ValueError(
      f"Expected temperature > 0, got {temperature}. Completions drawn "
      "greedily are scored at temperature 1."
    )
  logits_BTV = logits_BTV.astype(jnp.float32) / temperature
  log_normalizer_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
  # A gather would become a scatter on the way back, and an all-gather where
  # the vocabulary is sharded; a masked sum is neither.
  vocabulary_V = jnp.arange(logits_BTV.shape[-1])
  is_target_BTV = targets_BT[..., None] == vocabulary_V
  target_logits_BT = jnp.sum(logits_BTV, axis=-1, where=is_target_BTV)
  logprobs_BTV = logits_BTV - log_normalizer_BT[..., None]
  return TokenStats(
    logprobs=target_logits_BT - log_normalizer_BT,
    entropy=-jnp.sum(jnp.exp(logprobs_BTV) * logprobs_BTV, axis=-1),
    log_normalizer=log_normalizer_BT,
    is_likeliest=target_logits_BT == jnp.max(logits_BTV, axis=-1),
  )


def of_targets(
  hidden_BTD: jax.Array,
  head_DV: jax.Array,
  targets_BT: jax.Array,
  *,
  temperature: float,
  chunk_size: int,
) -> TokenStats:
  """Computes the log-probability and entropy of tokens from hidden states.

  Equals `from_logits` of `hidden_BTD @ head_DV`, but no array of B x T x V
  elements ever exists, forward or backward.

  Args:
    hidden_BTD: final hidden states, after the last norm. The product with the
      head takes its inputs in this precision and accumulates in float32.
    head_DV: the unembedding kernel. Its gradient is summed over the chunks in
      its own precision, so give it in float32 where it is kept so.
    targets_BT: the token that each position predicts; the caller shifts.
    temperature: divides the logits, as it did when the tokens were sampled.
    chunk_size: tokens of each sequence whose logits exist at one time. T need
      not be a multiple of it.

  Returns:
    The statistics, with gradients through the first three.

  Raises:
    ValueError: if `temperature` or `chunk_size` is not positive.
  """
  if chunk_size < 1:
    raise ValueError(f"Expected chunk_size >= 1, got {chunk_size}.")
  num_tokens = targets_BT.shape[1]
  num_chunks = -(-num_tokens // chunk_size)
  # Even chunks: 513 tokens by 512 become 2 x 257, not 2 x 512.
  chunk_size = -(-num_tokens // num_chunks)

  def split(x: jax.Array) -> jax.Array:
    """Moves chunks of tokens in front, the last one padded with zeros."""
    padding = num_chunks * chunk_size - num_tokens
    x = jnp.pad(x, [(0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)])
    x = x.reshape(x.shape[0], num_chunks, chunk_size, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  def join(x: jax.Array) -> jax.Array:
    """Undoes `split`."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, :num_tokens]

  @jax.checkpoint
  def stats_of_chunk(chunk: tuple[jax.Array, jax.Array]) -> TokenStats:
    hidden_BTD, targets_BT = chunk
    logits_BTV = jnp.einsum(
      "BTD,DV->BTV",
      hidden_BTD,
      head_DV.astype(hidden_BTD.dtype),
      preferred_element_type=jnp.float32,
    )
    return from_logits(logits_BTV, targets_BT, temperature=temperature)

  chunks = jax.lax.map(stats_of_chunk, (split(hidden_BTD), split(targets_BT)))
  return jax.tree.map(join, chunks)
