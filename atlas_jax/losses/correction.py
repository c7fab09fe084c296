# SPDX-License-Identifier: Apache-2.0
"""Importance weights that correct for the sampler's distribution."""

from typing import Literal

import jax
import jax.numpy as jnp

from atlas_jax import errors

Level = Literal["token", "sequence"]
Outside = Literal["truncate", "mask"]


def sampler_weights(
  old_logprobs_BT: jax.Array,
  rollout_logprobs_BT: jax.Array,
  loss_mask_BT: jax.Array,
  *,
  level: Level,
  outside: Outside,
  min_ratio: float,
  max_ratio: float,
) -> jax.Array:
  """Computes bounded weights exp(old - rollout).

  Sampler and trainer use the same weights, but their kernels and precision
  differ, so tokens are drawn from a slightly different distribution than the
  one whose gradient is computed; with older weights, from a more different one.
  Both log-probabilities must be under the sampling distribution: at the
  sampling temperature, over the tokens that top-p and top-k keep. Otherwise the
  ratio would measure the sampling settings.

  Source: truncation, Yao et al., "Your Efficient RL Framework Secretly Brings
  You Off-Policy RL Training" (2025); masking, the Ling team, "Small Leak Can
  Sink a Great Ship: Boost RL Training on MoE with IcePop!" (2025).

  Args:
    old_logprobs_BT: by the trainer.
    rollout_logprobs_BT: by the sampler, as reported.
    loss_mask_BT: bool; the tokens that count. The rest may hold anything.
    level: one ratio per "token", or their product per "sequence", which is
      unbiased, but whose variance grows with the length.
    outside: handling of ratios out of bounds: "truncate" clips them, "mask"
      sets the weights of their tokens to 0.
    min_ratio: lower bound; 0.0 for none.
    max_ratio: upper bound, which keeps single tokens from dominating a batch.
      Truncating with both bounds at 1.0 disables the correction.

  Returns:
    float32[B, T], without gradient; 1 where masked, if that is within bounds.

  Raises:
    errors.ConfigError: if a name is unknown or the bounds are out of order.
  """
  _check(level, outside, min_ratio, max_ratio)
  log_ratio_BT = jnp.where(
    loss_mask_BT, old_logprobs_BT - rollout_logprobs_BT, 0.0
  )
  if level == "sequence":
    total_B1 = jnp.sum(log_ratio_BT, axis=1, keepdims=True)
    log_ratio_BT = jnp.broadcast_to(total_B1, log_ratio_BT.shape)
  ratio_BT = jnp.exp(log_ratio_BT)
  bounded_BT = jnp.clip(ratio_BT, min_ratio, max_ratio)
  if outside == "mask":
    bounded_BT = jnp.where(bounded_BT == ratio_BT, ratio_BT, 0.0)
  return jax.lax.stop_gradient(bounded_BT)


def _check(
  level: str, outside: str, min_ratio: float, max_ratio: float
) -> None:
  """Validates the settings."""
  if (
    level not in ("token", "sequence")
    or outside not in ("truncate", "mask")
    or not 0.0 <= min_ratio <= max_ratio
  ):
    raise errors.ConfigError(
      "Invalid sampler correction: level must be token or sequence, outside "
      "must be truncate or mask, and 0 <= min_ratio <= max_ratio.",
      where=f"--config.correction: level={level!r}, outside={outside!r}, "
      f"min_ratio={min_ratio}, max_ratio={max_ratio}",
      why="No importance weight is defined for other settings.",
      fix="For example, set level=token, outside=truncate, min_ratio=0 and "
      "max_ratio=2.",
    )
