# SPDX-License-Identifier: Apache-2.0
"""Importance weights from the distribution drawn from to the one trained."""

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

  Sampler and trainer hold the same weights, yet their kernels and precision
  differ, so the tokens were drawn from a slightly different distribution than
  the one whose gradient is taken; with weights a step older, from a more
  different one. Both log-probabilities are of the distribution that was drawn
  from: at the sampling temperature, over what top-p and top-k left. Either
  alone, at temperature 1 or over the whole vocabulary, would make the ratio a
  measure of the sampling settings.

  Source: Yao et al., "Your Efficient RL Framework Secretly Brings You
  Off-Policy RL Training" (2025), for truncation; the Ling team, "Small Leak
  Can Sink a Great Ship: Boost RL Training on MoE with IcePop!" (2025), for
  masking.

  Args:
    old_logprobs_BT: by the trainer.
    rollout_logprobs_BT: as the sampler reported them.
    loss_mask_BT: bool; the tokens that count. The rest may hold anything.
    level: a ratio for each "token", or the product of them for the "sequence":
      without bias, but its variance grows with the length.
    outside: what becomes of ratios out of bounds: "truncate" puts them on the
      bound, "mask" gives their tokens no weight.
    min_ratio: the lower bound; 0.0 for none.
    max_ratio: the upper bound, which keeps one odd token from ruling the
      batch. Truncated with both bounds at 1.0, nothing is corrected.

  Returns:
    float32[B, T], without gradient; 1 where masked, if that is within bounds.

  Raises:
    errors.ConfigError: for an unknown name, or bounds in the wrong order.
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
  """Refuses what is no correction."""
  if (
    level not in ("token", "sequence")
    or outside not in ("truncate", "mask")
    or not 0.0 <= min_ratio <= max_ratio
  ):
    raise errors.ConfigError(
      "The sampler's tokens cannot be weighed like this.",
      where=f"--config.correction: level={level!r}, outside={outside!r}, "
      f"min_ratio={min_ratio}, max_ratio={max_ratio}",
      why="A ratio is of a token or a sequence, truncated or masked, and its "
      "lower bound is between 0 and the upper.",
      fix="For example level=token, outside=truncate, min_ratio=0, "
      "max_ratio=2.",
    )
