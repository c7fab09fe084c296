# SPDX-License-Identifier: Apache-2.0
"""Policy-gradient objectives: GRPO and related methods."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from atlas_jax import errors
from atlas_jax.losses import kl, reduce

Ratio = Literal["token", "sequence", "sequence_token", "product"]
Clipping = Literal["objective", "weight"]
KlIn = Literal["loss", "weighted_loss", "reward"]

_CHOICES = {
  "ratio": ("token", "sequence", "sequence_token", "product"),
  "clipping": ("objective", "weight"),
  "kl_estimator": ("k1", "k2", "k3"),
  "kl_in": ("loss", "weighted_loss", "reward"),
  "aggregate": reduce.AGGREGATES,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
  """Settings of `surrogate`, one combination per published method.

  `ratio` is policy / old policy: per "token"; per "sequence", the geometric
  mean over its tokens (GSPO); "sequence_token", with the value of the sequence
  and the gradient of the token (GSPO-token); or the "product" over the sequence
  (RLOO).

  `clipping` bounds the ratio to [1 - clip_low, 1 + clip_high] in the
  "objective" (PPO: clipped tokens get no gradient), or as the "weight" of the
  log-probability (CISPO: every token gets one). With "objective", `max_ratio`
  also bounds the ratio of tokens with a negative advantage, which the clipping
  leaves unbounded; None for no bound.

  `kl_coef` is the weight of the KL divergence from the reference, estimated by
  `kl_estimator` and added to the "loss"; to the loss times the ratio, for its
  gradient ("weighted_loss"); or, by the caller, to the "reward". See
  `losses.kl`.

  `entropy_coef` is the weight of an entropy bonus. `aggregate` names a mean of
  `losses.reduce`, and `max_tokens` is the length of "constant_length".
  """

  ratio: Ratio
  clipping: Clipping
  clip_low: float
  clip_high: float
  max_ratio: float | None
  kl_coef: float
  kl_estimator: kl.Estimator
  kl_in: KlIn
  entropy_coef: float
  aggregate: reduce.Aggregate
  max_tokens: int

  def __post_init__(self) -> None:
    """Rejects invalid settings, and settings that would be ignored."""
    for name, known in _CHOICES.items():
      if getattr(self, name) not in known:
        raise self._invalid(
          name,
          f"must be one of {known}",
          why="No loss is defined for another name.",
          fix=f"Set it to one of {known}.",
        )
    for name in ("clip_low", "clip_high"):
      if getattr(self, name) < 0.0:
        raise self._invalid(
          name,
          "must be >= 0",
          why="The bounds would exclude a ratio of 1, where every step starts.",
          fix="Set both bounds to 0 or more, for example 0.2.",
        )
    if self.max_ratio is not None and (
      self.clipping == "weight" or self.max_ratio <= 1.0 + self.clip_high
    ):
      raise self._invalid(
        "max_ratio",
        'must exceed 1 + clip_high, and requires clipping="objective"',
        why="It would be ignored, or override clip_high.",
        fix='Set it above 1 + clip_high with clipping="objective", or leave it '
        "out.",
      )
    if self.kl_coef and self.kl_estimator == "k1" and self.kl_in == "loss":
      raise self._invalid(
        "kl_estimator",
        'must be k2 or k3 with kl_in="loss"',
        why="The expected gradient of k1 as a loss is 0.",
        fix="Set kl_in to weighted_loss or reward, or use k2 or k3.",
      )

  def _invalid(
    self, name: str, rule: str, *, why: str, fix: str
  ) -> errors.ConfigError:
    value = getattr(self, name)
    return errors.ConfigError(
      f"Invalid loss configuration: {name} {rule}, got {value!r}.",
      where=f"--config.loss.{name}={value}",
      why=why,
      fix=fix,
    )


def surrogate(
  logprobs_BT: jax.Array,
  old_logprobs_BT: jax.Array,
  ref_logprobs_BT: jax.Array | None,
  entropy_BT: jax.Array,
  advantages_B: jax.Array,
  loss_mask_BT: jax.Array,
  *,
  rollout_weights_BT: jax.Array,
  objective: Objective,
) -> tuple[jax.Array, dict[str, jax.Array | reduce.Mean]]:
  """Computes the loss of a batch of completions.

  With r the ratio, w the sampler correction, A the advantage, H the entropy and
  sg() stop_gradient, the loss of a token is

    -w min(min(r, max_ratio) A, clip(r) A) + kl_coef KL - entropy_coef H

  or, with clipping="weight", -w sg(clip(r)) A log policy as the first term.

  Source: Shao et al., arXiv:2402.03300, equation 3; separate bounds and the
  mean over tokens, Yu et al., arXiv:2503.14476, sections 3.1 and 3.3; ratios of
  sequences, Zheng et al., arXiv:2507.18071, sections 4.1 and 4.3; the clipped
  weight, MiniMax, arXiv:2506.13585, section 3.1; `max_ratio`, Prime Intellect,
  arXiv:2505.07291, section 3.4.

  Args:
    logprobs_BT: by the policy, under the sampling distribution; only these and
      the entropy have gradients.
    old_logprobs_BT: by the policy at the start of this step, as computed by the
      trainer.
    ref_logprobs_BT: by the reference; None to measure the KL from the old
      policy instead, if kl_coef = 0.0.
    entropy_BT: of the policy at each token.
    advantages_B: one per completion.
    loss_mask_BT: bool; the tokens that count. Where False, the other arrays may
      hold anything.
    rollout_weights_BT: from `correction.sampler_weights`; ones to disable it.
    objective: the objective's settings.

  Returns:
    The loss, and metrics over what counts; see `_metrics`.
  """
  kl_name = "kl_old" if ref_logprobs_BT is None else "kl"
  if ref_logprobs_BT is None:
    ref_logprobs_BT = old_logprobs_BT
  fixed = (old_logprobs_BT, ref_logprobs_BT, advantages_B, rollout_weights_BT)
  old_logprobs_BT, ref_logprobs_BT, advantages_B, rollout_weights_BT = (
    jax.lax.stop_gradient(fixed)
  )
  # Masked before exp(): where() after it would still leak NaN gradients.
  logprobs_BT = jnp.where(loss_mask_BT, logprobs_BT, 0.0)
  rollout_weights_BT = jnp.where(loss_mask_BT, rollout_weights_BT, 0.0)
  log_ratio_BT = jnp.where(loss_mask_BT, logprobs_BT - old_logprobs_BT, 0.0)
  gap_BT = jnp.where(loss_mask_BT, logprobs_BT - ref_logprobs_BT, 0.0)

  ratio_BT = jnp.exp(
    _of_level(log_ratio_BT, loss_mask_BT, level=objective.ratio)
  )
  gain_BT, is_clipped_BT = _gain(
    ratio_BT, logprobs_BT, advantages_B[:, None], objective=objective
  )
  kl_BT = kl.estimate(gap_BT, estimator=objective.kl_estimator)
  loss_BT = -rollout_weights_BT * gain_BT
  if objective.kl_coef and objective.kl_in == "loss":
    loss_BT += objective.kl_coef * kl_BT
  elif objective.kl_coef and objective.kl_in == "weighted_loss":
    weighted_BT = kl.weighted(kl_BT, ratio_BT, estimator=objective.kl_estimator)
    loss_BT += objective.kl_coef * weighted_BT
  if objective.entropy_coef:
    loss_BT -= objective.entropy_coef * entropy_BT

  loss = reduce.mean(
    loss_BT,
    loss_mask_BT,
    aggregate=objective.aggregate,
    length=objective.max_tokens,
  )
  metrics = _metrics(
    ratio_BT, is_clipped_BT, loss_mask_BT, level=objective.ratio
  )
  return loss, {
    "loss": loss,
    kl_name: reduce.over_tokens(kl_BT, loss_mask_BT),
    "entropy": reduce.over_tokens(entropy_BT, loss_mask_BT),
    **metrics,
  }


def _of_level(
  log_ratio_BT: jax.Array, loss_mask_BT: jax.Array, *, level: Ratio
) -> jax.Array:
  """Computes log-ratios at the given level from those of tokens, 0 if masked.

  With l_t of n tokens: "product" is sum_t l_t, "sequence" sum_t l_t / n, and
  "sequence_token" sg(sum_t l_t / n) + l_t - sg(l_t).
  """
  if level == "token":
    return log_ratio_BT
  total_B1 = jnp.sum(log_ratio_BT, axis=1, keepdims=True)
  if level == "product":
    return jnp.broadcast_to(total_B1, log_ratio_BT.shape)
  num_tokens_B1 = jnp.sum(loss_mask_BT, axis=1, keepdims=True)
  mean_B1 = total_B1 / jnp.maximum(num_tokens_B1, 1)
  if level == "sequence":
    return jnp.broadcast_to(mean_B1, log_ratio_BT.shape)
  own_BT = log_ratio_BT - jax.lax.stop_gradient(log_ratio_BT)
  return jax.lax.stop_gradient(mean_B1) + own_BT


def _gain(
  ratio_BT: jax.Array,
  logprobs_BT: jax.Array,
  advantages_B1: jax.Array,
  *,
  objective: Objective,
) -> tuple[jax.Array, jax.Array]:
  """Computes the clipped gain of each token, and whether it was clipped."""
  clipped_BT = jnp.clip(
    ratio_BT, 1.0 - objective.clip_low, 1.0 + objective.clip_high
  )
  if objective.clipping == "weight":
    weight_BT = jax.lax.stop_gradient(clipped_BT)
    return weight_BT * advantages_B1 * logprobs_BT, weight_BT != ratio_BT
  bounded_BT = jnp.minimum(ratio_BT, objective.max_ratio or jnp.inf)
  free_BT = bounded_BT * advantages_B1
  gain_BT = jnp.minimum(free_BT, clipped_BT * advantages_B1)
  return gain_BT, gain_BT < free_BT


def _metrics(
  ratio_BT: jax.Array,
  is_clipped_BT: jax.Array,
  loss_mask_BT: jax.Array,
  *,
  level: Ratio,
) -> dict[str, jax.Array | reduce.Mean]:
  """Computes metrics of the ratio: over tokens, or sequences if it is of them.

  `clip_low_fraction` and `clip_high_fraction` are the fractions that were
  clipped with a ratio below and above 1.
  """
  low_BT, high_BT = ratio_BT < 1.0, ratio_BT > 1.0
  over = reduce.over(level)
  return {
    "ratio_mean": over(ratio_BT, loss_mask_BT),
    "ratio_max": jnp.max(ratio_BT, where=loss_mask_BT, initial=0.0),
    "clip_low_fraction": over(is_clipped_BT & low_BT, loss_mask_BT),
    "clip_high_fraction": over(is_clipped_BT & high_BT, loss_mask_BT),
  }
