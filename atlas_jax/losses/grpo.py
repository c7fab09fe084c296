# SPDX-License-Identifier: Apache-2.0
"""Group relative policy optimization: advantages and the clipped surrogate."""

import jax
import jax.numpy as jnp

from atlas_jax.losses import reduce

# Added to the group's standard deviation, as ATLAS and TRL do.
_STD_EPSILON = 1e-4


def group_advantages(
  rewards_PC: jax.Array, valid_PC: jax.Array, *, scale_by_std: bool
) -> jax.Array:
  """Computes how much better each completion did than its group.

  This is (R - mean) / (std + 1e-4), with the sample standard deviation.

  Source: Shao et al., arXiv:2402.03300, section 4.1.2; without the division,
  Liu et al., arXiv:2503.20783.

  Args:
    rewards_PC: rewards of the C completions of P prompts.
    valid_PC: bool; False where the reward is missing. Such a reward may hold
      anything: it is not part of its group's mean and deviation.
    scale_by_std: whether to divide by the deviation.

  Returns:
    float32[P, C]. Exactly 0 where the reward is missing, and in groups with
    fewer than two rewards or with all rewards equal: there is nothing to learn.
  """
  rewards_PC = jnp.asarray(rewards_PC, jnp.float32)
  count_P1 = jnp.sum(valid_PC, axis=1, keepdims=True)
  total_P1 = jnp.sum(rewards_PC, axis=1, keepdims=True, where=valid_PC)
  mean_P1 = total_P1 / jnp.maximum(count_P1, 1)
  advantages_PC = jnp.where(valid_PC, rewards_PC - mean_P1, 0.0)
  if scale_by_std:
    squares_P1 = jnp.sum(jnp.square(advantages_PC), axis=1, keepdims=True)
    std_P1 = jnp.sqrt(squares_P1 / jnp.maximum(count_P1 - 1, 1))
    advantages_PC = advantages_PC / (std_P1 + _STD_EPSILON)
  # The mean of equal rewards is rounded, and dividing by 1e-4 would magnify
  # what is left of them.
  best_P = jnp.max(rewards_PC, axis=1, where=valid_PC, initial=-jnp.inf)
  worst_P = jnp.min(rewards_PC, axis=1, where=valid_PC, initial=jnp.inf)
  return jnp.where((best_P > worst_P)[:, None], advantages_PC, 0.0)


def sampler_correction(
  old_logprobs_BT: jax.Array,
  rollout_logprobs_BT: jax.Array,
  loss_mask_BT: jax.Array,
  *,
  max_ratio: float,
) -> jax.Array:
  """Computes importance weights from the sampler's policy to the trainer's.

  Both hold the same weights, yet their kernels and precision differ, so the
  tokens were drawn from a slightly different distribution than the one whose
  gradient is taken. The weight is min(exp(old - rollout), max_ratio).

  Source: Yao et al., "Your Efficient RL Framework Secretly Brings You
  Off-Policy RL Training" (2025), truncated importance sampling.

  Args:
    old_logprobs_BT: by the trainer, at the sampling temperature.
    rollout_logprobs_BT: as the sampler reported them, of the distribution that
      it drew from.
    loss_mask_BT: bool; the tokens that count. The rest may hold anything.
    max_ratio: the bound which keeps one odd token from ruling the batch.

  Returns:
    float32[B, T], without gradient; 1 (or `max_ratio`, if less) where masked.
  """
  log_ratio_BT = jnp.where(
    loss_mask_BT, old_logprobs_BT - rollout_logprobs_BT, 0.0
  )
  return jax.lax.stop_gradient(jnp.minimum(jnp.exp(log_ratio_BT), max_ratio))


def clipped_surrogate(  # noqa: PLR0913 - one argument per symbol.
  logprobs_BT: jax.Array,
  old_logprobs_BT: jax.Array,
  ref_logprobs_BT: jax.Array,
  advantages_B: jax.Array,
  loss_mask_BT: jax.Array,
  *,
  rollout_weights_BT: jax.Array,
  clip_low: float,
  clip_high: float,
  kl_coef: float,
  aggregate: reduce.Aggregate,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Computes the GRPO loss of a batch of completions.

  With r the ratio of the policy to the policy before this step, w the sampler
  correction and A the advantage, the loss of a token is
  -w min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_coef KL.

  Source: Shao et al., arXiv:2402.03300, equation 3; bounds set apart and the
  mean over tokens from Yu et al., arXiv:2503.14476, sections 3.1 and 3.3.

  Args:
    logprobs_BT: by the policy; the only argument that gets a gradient.
    old_logprobs_BT: by the policy at the start of this step, as the trainer
      computed them.
    ref_logprobs_BT: by the reference. With a `kl_coef` of 0.0 they show in the
      metrics alone, and `old_logprobs_BT` will do.
    advantages_B: one per completion.
    loss_mask_BT: bool; the tokens that count. Where it is False the other
      arrays may hold anything.
    rollout_weights_BT: from `sampler_correction`; ones for no correction.
    clip_low: how far below 1 the ratio still moves the policy.
    clip_high: the same, above 1.
    kl_coef: weight of the divergence from the reference.
    aggregate: GRPO takes the mean over sequences, DAPO over tokens.

  Returns:
    The loss, and metrics over the counted tokens; see `_metrics`.
  """
  fixed = (old_logprobs_BT, ref_logprobs_BT, advantages_B, rollout_weights_BT)
  old_logprobs_BT, ref_logprobs_BT, advantages_B, rollout_weights_BT = (
    jax.lax.stop_gradient(fixed)
  )
  # Masked before exp(): where() after it would still leak NaN gradients.
  log_ratio_BT = jnp.where(loss_mask_BT, logprobs_BT - old_logprobs_BT, 0.0)
  ref_gap_BT = jnp.where(loss_mask_BT, ref_logprobs_BT - logprobs_BT, 0.0)

  ratio_BT = jnp.exp(log_ratio_BT)
  clipped_BT = jnp.clip(ratio_BT, 1.0 - clip_low, 1.0 + clip_high)
  gain_BT = jnp.minimum(
    ratio_BT * advantages_B[:, None], clipped_BT * advantages_B[:, None]
  )
  kl_BT = jnp.expm1(ref_gap_BT) - ref_gap_BT  # Schulman's k3; never negative.
  loss_BT = kl_coef * kl_BT - rollout_weights_BT * gain_BT

  loss = reduce.mean(loss_BT, loss_mask_BT, aggregate=aggregate)
  is_clipped_BT = gain_BT < ratio_BT * advantages_B[:, None]
  metrics = _metrics(ratio_BT, kl_BT, is_clipped_BT, loss_mask_BT)
  return loss, {"loss": loss, **metrics}


def _metrics(
  ratio_BT: jax.Array,
  kl_BT: jax.Array,
  is_clipped_BT: jax.Array,
  loss_mask_BT: jax.Array,
) -> dict[str, jax.Array]:
  """Averages over the counted tokens what tells a healthy step from a wild one.

  `clip_low_fraction` and `clip_high_fraction` count the tokens that the bound
  below and above 1 kept from moving the policy any further.
  """
  low_BT, high_BT = ratio_BT < 1.0, ratio_BT > 1.0
  return {
    "kl": reduce.token_mean(kl_BT, loss_mask_BT),
    "ratio_mean": reduce.token_mean(ratio_BT, loss_mask_BT),
    "ratio_max": jnp.max(ratio_BT, where=loss_mask_BT, initial=0.0),
    "clip_low_fraction": reduce.token_mean(
      is_clipped_BT & low_BT, loss_mask_BT
    ),
    "clip_high_fraction": reduce.token_mean(
      is_clipped_BT & high_BT, loss_mask_BT
    ),
  }
