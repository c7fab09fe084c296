# SPDX-License-Identifier: Apache-2.0
"""Cross entropy with z-loss."""

import jax
import jax.numpy as jnp

from atlas_jax.losses import reduce


def cross_entropy(
  logprobs_BT: jax.Array,
  log_normalizer_BT: jax.Array,
  loss_mask_BT: jax.Array,
  *,
  z_loss_coef: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Computes the mean negative log-likelihood of the counted tokens.

  The z-loss is `z_loss_coef` times the mean square of the log normalizer. It
  prevents a drift of the logits, to which softmax is invariant.

  Source: Chowdhery et al., arXiv:2204.02311, section 5 (z-loss, 1e-4).

  Args:
    logprobs_BT: log-probabilities of the targets, in nats.
    log_normalizer_BT: log-sum-exp of the logits; see `logprobs.TokenStats`.
    loss_mask_BT: bool; the tokens that count. The rest may hold anything.
    z_loss_coef: weight of the z-loss; 0.0 disables it.

  Returns:
    The loss, and metrics: `loss`, its `cross_entropy` part and `num_tokens`,
    the number of tokens that both are means over.
  """
  # Masked before square(): where() after it would still leak NaN gradients.
  log_normalizer_BT = jnp.where(loss_mask_BT, log_normalizer_BT, 0.0)
  z_loss = reduce.token_mean(jnp.square(log_normalizer_BT), loss_mask_BT)
  nll = reduce.token_mean(-logprobs_BT, loss_mask_BT)
  loss = nll + z_loss_coef * z_loss
  num_tokens = jnp.sum(loss_mask_BT)
  return loss, {"loss": loss, "cross_entropy": nll, "num_tokens": num_tokens}
