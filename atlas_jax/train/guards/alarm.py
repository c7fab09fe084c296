# SPDX-License-Identifier: Apache-2.0
"""Warns about, or stops on, update metrics that exceed their bounds.

The loss clips large probability ratios silently; the alarm reports them. It
also reports batches in which few groups have a learning signal, with the causes
that `diagnosis` counted.
"""

from collections.abc import Mapping, Sequence
import dataclasses

from absl import logging
import jax

from atlas_jax import errors, types
from atlas_jax.train.guards import diagnosis


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
  # Fixes of the causes that a sample was shown with.
  _shown: set[str] = dataclasses.field(
    default_factory=set, init=False, repr=False, compare=False
  )

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
    self,
    metrics: Mapping[str, float | jax.Array],
    records: Sequence[types.TeachingRecord],
    rewarded: Sequence[types.Reward],
    *,
    step: int,
  ) -> None:
    """Checks the metrics after `step` steps; NaN is not out of bounds.

    Args:
      metrics: of the step. `ratio_max`, `kl` and `kl_old` may be missing: a
        step without any used group makes no update.
      records: graded records of the step, to find causes in.
      rewarded: their rewards.
      step: number of completed steps.

    Raises:
      errors.DivergedError: if `stop` is set and a bound is exceeded.
    """
    used = float(metrics["groups/used_fraction"])
    if used < self.min_used_fraction or not metrics["num_tokens"]:
      masked = float(metrics["groups/truncated_fraction"])
      logging.warning(
        "ALARM at step %d: groups/used_fraction is %.4g%s. In %.0f %% of the "
        "groups all rewards are equal or missing%s.\n%s",
        step,
        used,
        f", below --config.alarm.min_used_fraction={self.min_used_fraction:g}"
        if metrics["num_tokens"]
        else ", and the step trained on no token",
        100 * (1.0 - used - masked),
        f"; in {masked:.0%} every completion was truncated, and "
        "--config.batch.mask_truncated leaves it out"
        if masked
        else "",
        self._explain(records, rewarded),
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

  def _explain(
    self,
    records: Sequence[types.TeachingRecord],
    rewarded: Sequence[types.Reward],
  ) -> str:
    """Returns the causes; with a sample the first time that each is found."""
    causes = diagnosis.causes(records, rewarded)
    lines = [f"  cause: {cause}" for cause in causes] or [
      "  cause: none is common to half of the completions"
    ]
    fixes = {cause.fix for cause in causes}
    if not self._shown or not fixes <= self._shown:
      self._shown.update(fixes, {""})
      lines += ["  sample:", diagnosis.sample(records[0], rewarded[0])]
    return "\n".join(lines)
