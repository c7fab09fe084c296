# SPDX-License-Identifier: Apache-2.0
"""Log-probability and entropy of given tokens, chunked over the sequence."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from atlas_jax.losses import chunks

# What a sampler cannot draw: exp() of it is 0.0, and it is finite, so that
# nothing becomes NaN where -inf times 0.0 would.
_NEVER = -1e30


class Support(NamedTuple):
  """The part of the vocabulary that a sampler draws from.

  The `top_k` likeliest tokens, 0 for all; of those the likeliest that together
  hold `top_p` of the probability, 1.0 for all.
  """

  top_p: float
  top_k: int


class TokenStats(NamedTuple):
  """What a loss needs to know of each token's distribution, [B, T].

  The first three are float32, in nats, and of the distribution after the
  temperature, over what the support keeps. `log_normalizer` is the log-sum-exp
  of the logits. `is_likeliest` is bool: whether no other token is likelier.
  """

  logprobs: jax.Array
  entropy: jax.Array
  log_normalizer: jax.Array
  is_likeliest: jax.Array


def from_logits(
  logits_BTV: jax.Array,
  targets_BT: jax.Array,
  *,
  temperature: float,
  support: Support | None = None,
) -> TokenStats:
  """Computes the log-probability and entropy of tokens from whole logits.

  Tokens that were drawn with top-p or top-k were drawn from a smaller
  vocabulary, with the probability of the rest shared out among it. A policy is
  what draws, so that is its distribution, and its gradient is the one over the
  support: over the whole vocabulary the ratio to the sampler would be off by
  the probability that was cut. What is kept is decided by the logits at hand,
  without gradient. The target is always kept: where precision, or an update,
  has moved it across the border, its probability is small but not 0.

  Args:
    logits_BTV: float logits of any precision; computed in float32.
    targets_BT: the token that each position predicts; the caller shifts.
    temperature: divides the logits, as it did when the tokens were sampled.
    support: what the sampler drew from; None for the whole vocabulary, which
      is where there was no sampler.

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
  # A gather would become a scatter on the way back, and an all-gather where
  # the vocabulary is sharded; a masked sum is neither.
  vocabulary_V = jnp.arange(logits_BTV.shape[-1])
  is_target_BTV = targets_BT[..., None] == vocabulary_V
  if support is not None:
    is_kept_BTV = _is_kept(jax.lax.stop_gradient(logits_BTV), support)
    logits_BTV = jnp.where(is_kept_BTV | is_target_BTV, logits_BTV, _NEVER)
  log_normalizer_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
  target_logits_BT = jnp.sum(logits_BTV, axis=-1, where=is_target_BTV)
  logprobs_BTV = logits_BTV - log_normalizer_BT[..., None]
  return TokenStats(
    logprobs=target_logits_BT - log_normalizer_BT,
    entropy=-jnp.sum(jnp.exp(logprobs_BTV) * logprobs_BTV, axis=-1),
    log_normalizer=log_normalizer_BT,
    is_likeliest=target_logits_BT == jnp.max(logits_BTV, axis=-1),
  )


def _is_kept(logits_BTV: jax.Array, support: Support) -> jax.Array:
  """Tells what a sampler may draw; of equal logits at the border, all."""
  num_kept = support.top_k or logits_BTV.shape[-1]
  sorted_BTV, _ = jax.lax.top_k(logits_BTV, min(num_kept, logits_BTV.shape[-1]))
  probs_BTV = jax.nn.softmax(sorted_BTV, axis=-1)
  before_BTV = jnp.cumsum(probs_BTV, axis=-1) - probs_BTV
  # The likeliest token always stays: nothing comes before it.
  in_nucleus_BTV = before_BTV < support.top_p
  border_BT1 = jnp.min(
    sorted_BTV, axis=-1, keepdims=True, where=in_nucleus_BTV, initial=jnp.inf
  )
  return logits_BTV >= border_BT1


def of_targets(
  hidden_BTD: jax.Array,
  head_DV: jax.Array,
  targets_BT: jax.Array,
  *,
  temperature: float,
  chunk_tokens: int,
  support: Support | None = None,
  soft_cap: float | None = None,
) -> TokenStats:
  """Computes the log-probability and entropy of tokens from hidden states.

  Equals `from_logits` of `hidden_BTD @ head_DV`, soft-capped, but no array of
  B x T x V elements ever exists, forward or backward.

  Args:
    hidden_BTD: final hidden states; see `chunks.project`.
    head_DV: the unembedding kernel; likewise.
    targets_BT: the token that each position predicts; the caller shifts.
    temperature: divides the logits, as it did when the tokens were sampled.
    chunk_tokens: tokens of each sequence whose logits exist at one time. T need
      not be a multiple of it.
    support: as in `from_logits`.
    soft_cap: of the logits; likewise.

  Returns:
    The statistics, with gradients through the first three.

  Raises:
    ValueError: if `temperature` or `chunk_tokens` is not positive.
  """

  def stats_of_chunk(chunk: tuple[jax.Array, jax.Array]) -> TokenStats:
    hidden_BTD, targets_BT = chunk
    return from_logits(
      chunks.project(hidden_BTD, head_DV, soft_cap=soft_cap),
      targets_BT,
      temperature=temperature,
      support=support,
    )

  return chunks.map_tokens(
    stats_of_chunk, (hidden_BTD, targets_BT), chunk_tokens=chunk_tokens
  )
