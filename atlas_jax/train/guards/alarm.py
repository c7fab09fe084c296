# SPDX-License-Identifier: Apache-2.0
"""Warns about, or stops on, update metrics that exceed their bounds.

The loss clips large probability ratios silently; the alarm reports them. It
also reports batches in which few groups have a learning signal.
"""

from collections.abc import Mapping
import dataclasses

from absl import logging
import jax

from atlas_jax import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alarm:
  """Bounds on the metrics of each update.

  Attributes:
    max_ratio: upper bound on `ratio_max`, a token's probability divided by its
      probability at the start of the step; 0.0 for no bound.
    max_kl: upper bound on `kl`, from the reference, or, without a KL in the
      loss, on `kl_old`, from the policy at the start of the step; in nats per
      token; 0.0 for no bound.
    stop: whether to stop the run if one of these two is exceeded, instead of
      only warning.
    min_used_fraction: lower bound on `groups/used_fraction`, the fraction of
      groups with a learning signal; 0.0 for no bound. It only warns: a policy
      that answers every question correctly has no such groups. A step without
      any token to train on warns in any case.
  """

  max_ratio: float
  max_kl: float
  stop: bool
  min_used_fraction: float

  def __post_init__(self) -> None:
    """Rejects bounds that every step exceeds, and `stop` without a bound."""
    if (
      self.max_kl < 0.0
      or (self.max_ratio and self.max_ratio <= 1.0)
      or not 0.0 <= self.min_used_fraction <= 1.0
      or (self.stop and not (self.max_ratio or self.max_kl))
    ):
      raise errors.ConfigError(
        "Invalid alarm: max_ratio must be 0 or above 1, max_kl must be >= 0, "
        "min_used_fraction must be in [0, 1], and stop=True needs max_ratio or "
        "max_kl.",
        where=f"--config.alarm: max_ratio={self.max_ratio}, "
        f"max_kl={self.max_kl}, "
        f"min_used_fraction={self.min_used_fraction}, stop={self.stop}",
        why="The ratio starts at 1 and the KL divergence at 0, so lower bounds "
        "would be exceeded at every step.",
        fix="Set max_ratio=100, max_kl=10, min_used_fraction=0.1, for example; "
        "0 disables a bound.",
      )

  def check(
    self, metrics: Mapping[str, float | jax.Array], *, step: int
  ) -> None:
    """Checks the metrics after `step` steps; NaN is not out of bounds.

    `ratio_max`, `kl` and `kl_old` may be missing: a step without any used group
    makes no update.

    Raises:
      errors.DivergedError: if `stop` is set and a bound is exceeded.
    """
    used = float(metrics["groups/used_fraction"])
    if used < self.min_used_fraction or not metrics["num_tokens"]:
      truncated = float(metrics["groups/truncated_fraction"])
      logging.warning(
        "ALARM at step %d: groups/used_fraction is %.4g%s. In %.0f %% of the "
        "groups all rewards are equal or missing: the questions are too easy "
        "or too hard, or the reward fails. In %.0f %% every completion was "
        "truncated and --config.batch.mask_truncated leaves it out: raise "
        "--config.sampling.teach.max_completion_tokens.",
        step,
        used,
        f", below --config.alarm.min_used_fraction={self.min_used_fraction:g}"
        if metrics["num_tokens"]
        else ", and the step trained on no token",
        100 * (1.0 - used - truncated),
        100 * truncated,
      )
    for name, key, bound in (
      ("ratio_max", "max_ratio", self.max_ratio),
      ("kl", "max_kl", self.max_kl),
      ("kl_old", "max_kl", self.max_kl),
    ):
      value = float(metrics.get(name, 0.0))
      if not bound or not value > bound:
        continue
      logging.warning(
        "ALARM at step %d: %s is %.4g, above --config.alarm.%s=%g.",
        step,
        name,
        value,
        key,
        bound,
      )
      if self.stop:
        raise errors.DivergedError(
          f"The policy moved too far: {name} is {value:.4g}.",
          where=f"step {step}; --config.alarm.{key}={bound:g}",
          why="Updates are too large, or one batch is used for too many "
          "updates. This update is not saved.",
          fix="Lower --config.schedule.learning_rate, raise "
          "--config.loss.kl_coef, or inspect the completions of the last "
          "steps. Set --config.alarm.stop=False to only warn.",
        )
