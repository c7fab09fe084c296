# SPDX-License-Identifier: Apache-2.0
"""Log-probability and entropy of given tokens, in chunks over the sequence."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from atlas_jax.losses import chunks

# Logit of tokens outside the support: exp() of it is 0.0, but unlike -inf it is
# finite, so that products with 0.0 are not NaN.
_NEVER = -1e30


class Support(NamedTuple):
  """The part of the vocabulary that a sampler draws from.

  The `top_k` most likely tokens (0 for all), and of those the most likely ones
  that together hold `top_p` of the probability (1.0 for all).
  """

  top_p: float
  top_k: int


class TokenStats(NamedTuple):
  """Statistics of the distribution at each token, [B, T].

  The first three are float32, in nats, under the distribution after temperature
  and support. `log_normalizer` is the log-sum-exp of the logits. `is_likeliest`
  is bool: whether no other token is more likely than the target.
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
  """Computes log-probabilities and entropy from full logits.

  With top-p or top-k, tokens are drawn from a part of the vocabulary, with
  probabilities renormalised over it. That is the policy's distribution, so
  log-probabilities and gradients are over that support; over the full
  vocabulary, the ratio to the sampler would be off by the probability that was
  cut. The support is computed from the given logits, without gradient. It
  always includes the target: if rounding or an update moved the target out of
  the support, its probability is small, but not 0.

  Args:
    logits_BTV: float logits of any precision; computed in float32.
    targets_BT: the token that each position predicts; the caller shifts.
    temperature: divides the logits; that of sampling.
    support: the sampler's support; None for the full vocabulary.

  Returns:
    The statistics; the first three have gradients.

  Raises:
    ValueError: if `temperature` is not positive.
  """
  if temperature <= 0.0:
    raise ValueError(
      f"temperature must be > 0, got {temperature}. Score greedy completions "
      "at temperature 1."
    )
  logits_BTV = logits_BTV.astype(jnp.float32) / temperature
  # A masked sum instead of a gather, whose gradient is a scatter, and which is
  # an all-gather where the vocabulary is sharded.
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
  """Returns the support; of logits tied at its border, it has all."""
  num_kept = support.top_k or logits_BTV.shape[-1]
  sorted_BTV, _ = jax.lax.top_k(logits_BTV, min(num_kept, logits_BTV.shape[-1]))
  probs_BTV = jax.nn.softmax(sorted_BTV, axis=-1)
  before_BTV = jnp.cumsum(probs_BTV, axis=-1) - probs_BTV
  # Probability before a token is 0 for the first one, which is always kept.
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
  """Computes log-probabilities and entropy from hidden states, in chunks.

  Equals `from_logits` of `hidden_BTD @ head_DV`, soft-capped, but no array of
  B x T x V elements ever exists, forward or backward.

  Args:
    hidden_BTD: final hidden states; see `chunks.project`.
    head_DV: the unembedding kernel; see `chunks.project`.
    targets_BT: the token that each position predicts; the caller shifts.
    temperature: divides the logits; that of sampling.
    chunk_tokens: tokens of each sequence whose logits exist at one time; need
      not divide T.
    support: see `from_logits`.
    soft_cap: see `chunks.project`.

  Returns:
    The statistics; the first three have gradients.

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
