# SPDX-License-Identifier: Apache-2.0
"""The policy loss: GRPO and its relatives, as settings of one objective."""

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
  """What tells the members of the family apart; see `surrogate`.

  `ratio` is of the policy to the policy before this step: of each "token"; of
  the whole "sequence", as the geometric mean over its tokens (GSPO);
  "sequence_token", which has that value and the token's own gradient
  (GSPO-token); or the "product" over the sequence (RLOO).

  `clipping` bounds the ratio to [1 - clip_low, 1 + clip_high] in the
  "objective" (PPO: a token out of bounds gets no gradient), or as the "weight"
  of its log-probability (CISPO: every token keeps one). In the objective,
  `max_ratio` also bounds what a completion worse than its group can do to a
  token whose probability rose; None for no bound.

  `kl_coef` weighs the divergence from the reference, by `kl_estimator`: in the
  "loss"; in the "weighted_loss", times the ratio for its gradient's sake; or in
  the "reward", where the caller puts it. See `losses.kl`.

  `entropy_coef` rewards entropy. `aggregate`, and `max_tokens` for its constant
  length: see `losses.reduce`.
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
    """Refuses what is no objective, or would be ignored."""
    for name, known in _CHOICES.items():
      if getattr(self, name) not in known:
        raise self._refused(
          name, "There is no such choice.", f"Set it to one of {known}."
        )
    if self.clip_low < 0.0 or self.clip_high < 0.0:
      raise self._refused(
        "clip_low" if self.clip_low < 0.0 else "clip_high",
        "The bounds on the ratio would leave out 1, where every step starts.",
        "Set both to 0 or more, for example 0.2.",
      )
    if self.max_ratio is not None and (
      self.clipping == "weight" or self.max_ratio <= 1.0 + self.clip_high
    ):
      raise self._refused(
        "max_ratio",
        "It would be ignored, or hide the upper bound.",
        'Set it above 1 + clip_high with clipping="objective", or leave it '
        "out.",
      )
    if self.kl_coef and self.kl_estimator == "k1" and self.kl_in == "loss":
      raise self._refused(
        "kl_estimator",
        "The gradient of k1 as a loss is 0 in the mean.",
        "Set kl_in to weighted_loss or reward, or take k2 or k3.",
      )

  def _refused(self, name: str, why: str, fix: str) -> errors.ConfigError:
    return errors.ConfigError(
      "This loss cannot be had.",
      where=f"--config.loss.{name}={getattr(self, name)}",
      why=why,
      fix=fix,
    )


def surrogate(
  logprobs_BT: jax.Array,
  old_logprobs_BT: jax.Array,
  ref_logprobs_BT: jax.Array,
  entropy_BT: jax.Array,
  advantages_B: jax.Array,
  loss_mask_BT: jax.Array,
  *,
  rollout_weights_BT: jax.Array,
  objective: Objective,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Computes the loss of a batch of completions.

  With r the ratio, w the sampler correction, A the advantage, H the entropy and
  sg() what gets no gradient, the loss of a token is

    -w min(min(r, max_ratio) A, clip(r) A) + kl_coef KL - entropy_coef H

  or, clipping the weight, with -w sg(clip(r)) A log policy for its first term.

  Source: Shao et al., arXiv:2402.03300, equation 3; bounds set apart and the
  mean over tokens, Yu et al., arXiv:2503.14476, sections 3.1 and 3.3; ratios of
  sequences, Zheng et al., arXiv:2507.18071, sections 4.1 and 4.3; the clipped
  weight, MiniMax, arXiv:2506.13585, section 3.1; `max_ratio`, Prime Intellect,
  arXiv:2505.07291, section 3.4.

  Args:
    logprobs_BT: by the policy, of the distribution that was drawn from; this
      and the entropy get a gradient.
    old_logprobs_BT: by the policy at the start of this step, as the trainer
      computed them.
    ref_logprobs_BT: by the reference. With a `kl_coef` of 0.0 they show in the
      metrics alone, and `old_logprobs_BT` will do.
    entropy_BT: of the policy at each token.
    advantages_B: one per completion.
    loss_mask_BT: bool; the tokens that count. Where it is False the other
      arrays may hold anything.
    rollout_weights_BT: from `correction.sampler_weights`; ones for none.
    objective: which of the family.

  Returns:
    The loss, and metrics over the counted tokens; see `_metrics`.
  """
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
  metrics = _metrics(ratio_BT, kl_BT, entropy_BT, is_clipped_BT, loss_mask_BT)
  return loss, {"loss": loss, **metrics}


def _of_level(
  log_ratio_BT: jax.Array, loss_mask_BT: jax.Array, *, level: Ratio
) -> jax.Array:
  """Turns the log-ratios of tokens, 0 where masked, into those of a level."""
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
  """Computes what each token gains, and whether it met a bound."""
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
  kl_BT: jax.Array,
  entropy_BT: jax.Array,
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
    "entropy": reduce.token_mean(entropy_BT, loss_mask_BT),
    "ratio_mean": reduce.token_mean(ratio_BT, loss_mask_BT),
    "ratio_max": jnp.max(ratio_BT, where=loss_mask_BT, initial=0.0),
    "clip_low_fraction": reduce.token_mean(
      is_clipped_BT & low_BT, loss_mask_BT
    ),
    "clip_high_fraction": reduce.token_mean(
      is_clipped_BT & high_BT, loss_mask_BT
    ),
  }
