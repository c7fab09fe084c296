# SPDX-License-Identifier: Apache-2.0
"""Schulman's estimators of the KL divergence, and their gradients.

With d = log policy - log reference of a token drawn from the policy, in nats:

  k1 = d                  unbiased; negative for many tokens
  k2 = d^2 / 2            biased; never negative
  k3 = exp(-d) - 1 + d    unbiased; never negative

Each is averaged over drawn tokens. The gradient of that average has two parts,
since the policy also determines which tokens are drawn. Differentiating a loss
gives only the first part. With g the gradient of log policy, which is also that
of d:

  k1: g                 0 in expectation: as a loss it only adds noise
  k2: d g               the gradient of KL(policy || reference)
  k3: (1 - exp(-d)) g   the gradient of the reverse, KL(reference || policy)

GRPO as published and TRL use k3 as a loss; near the reference the two gradients
agree. Multiplying by the importance ratio r = policy / old, whose gradient is
r g, adds the second part and corrects for tokens drawn by an older policy: both
r k1 and r k3 have r d g, the gradient of KL(policy || reference), in
expectation. On policy, r k1 is the same as k1 as a penalty in the reward. k2
already has that gradient, so r is a weight without gradient there.

Source: Schulman, "Approximating KL Divergence" (2020); Tang and Munos,
arXiv:2506.09477; r k3, DeepSeek-AI, arXiv:2512.02556, section 3.1.
"""

from typing import Literal

import jax
import jax.numpy as jnp

Estimator = Literal["k1", "k2", "k3"]


def estimate(gap_BT: jax.Array, *, estimator: Estimator) -> jax.Array:
  """Estimates KL(policy || reference) from log policy - log reference.

  Raises:
    ValueError: if `estimator` is unknown.
  """
  match estimator:
    case "k1":
      return gap_BT
    case "k2":
      return jnp.square(gap_BT) / 2.0
    case "k3":
      return jnp.expm1(-gap_BT) + gap_BT
  raise ValueError(f"estimator must be k1, k2 or k3, got {estimator!r}.")


def weighted(
  kl_BT: jax.Array, ratio_BT: jax.Array, *, estimator: Estimator
) -> jax.Array:
  """Weights an estimate to have the gradient of KL(policy || reference).

  Args:
    kl_BT: from `estimate`.
    ratio_BT: policy / policy that drew the tokens, with its gradient.
    estimator: the estimator of `kl_BT`.
  """
  if estimator == "k2":
    ratio_BT = jax.lax.stop_gradient(ratio_BT)
  return ratio_BT * kl_BT


def of_sequences(
  old_logprobs_BT: jax.Array,
  ref_logprobs_BT: jax.Array,
  loss_mask_BT: jax.Array,
  *,
  estimator: Estimator,
) -> jax.Array:
  """Sums the estimates over each completion, as a penalty for its reward.

  Source: Ahmadian et al., arXiv:2402.14740, section 2, with k1.

  Returns:
    float32[B] in nats; 0 for completions without counted tokens.
  """
  gap_BT = jnp.where(loss_mask_BT, old_logprobs_BT - ref_logprobs_BT, 0.0)
  return jnp.sum(estimate(gap_BT, estimator=estimator), axis=1)
