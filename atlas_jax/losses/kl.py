# SPDX-License-Identifier: Apache-2.0
"""Schulman's estimators of the KL divergence, and their gradients.

With d = log policy - log reference of a token that the policy drew, in nats:

  k1 = d                  no bias; negative for many a token
  k2 = d^2 / 2            biased; never negative
  k3 = exp(-d) - 1 + d    no bias; never negative

All three are means over drawn tokens, and the gradient of such a mean has a
second part: the policy also decides which tokens are drawn. What a loss gets by
plain differentiation, for d is the gradient of log policy, call it g:

  k1: g              whose mean is 0: as a loss it does nothing but add noise
  k2: d g            which is the gradient of KL(policy || reference)
  k3: (1 - exp(-d)) g   which is that of KL(reference || policy), the other way

GRPO as published, and TRL, take k3 like that: near the reference the two
agree. With each token's importance ratio r = policy / old as a factor, whose
gradient is r g, the second part is there, and the tokens may come from an
older policy: r k1 and r k3 both have r d g, the gradient of KL(policy ||
reference), in the mean; on policy the first of them is k1 as a penalty in the
reward. For k2, which has it already, r is a weight without gradient.

Source: Schulman, "Approximating KL Divergence" (2020); Tang and Munos,
arXiv:2506.09477; DeepSeek-AI, arXiv:2512.02556, section 3.1, for r k3.
"""

from typing import Literal

import jax
import jax.numpy as jnp

Estimator = Literal["k1", "k2", "k3"]


def estimate(gap_BT: jax.Array, *, estimator: Estimator) -> jax.Array:
  """Estimates KL(policy || reference) from log policy - log reference.

  Raises:
    ValueError: if there is no such estimator.
  """
  match estimator:
    case "k1":
      return gap_BT
    case "k2":
      return jnp.square(gap_BT) / 2.0
    case "k3":
      return jnp.expm1(-gap_BT) + gap_BT
  raise ValueError(f"Unknown estimator {estimator!r}; there are k1, k2 and k3.")


def weighted(
  kl_BT: jax.Array, ratio_BT: jax.Array, *, estimator: Estimator
) -> jax.Array:
  """Weighs an estimate so that its gradient is that of KL(policy || reference).

  Args:
    kl_BT: from `estimate`.
    ratio_BT: of the policy to the one which drew the tokens, with its gradient.
    estimator: that made `kl_BT`.
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
  """Sums the estimates over each completion: the penalty in its reward.

  Source: Ahmadian et al., arXiv:2402.14740, section 2, with k1.

  Returns:
    float32[B] in nats; 0 where nothing is counted.
  """
  gap_BT = jnp.where(loss_mask_BT, old_logprobs_BT - ref_logprobs_BT, 0.0)
  return jnp.sum(estimate(gap_BT, estimator=estimator), axis=1)
