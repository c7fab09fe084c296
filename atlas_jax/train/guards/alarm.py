# SPDX-License-Identifier: Apache-2.0
"""What an update may look like before somebody is told.

The loss clips how far a token can move the policy; this tells that it had to,
and may stop. It tells of batches that teach next to nothing, too.
"""

from collections.abc import Mapping
import dataclasses

from absl import logging
import jax

from atlas_jax import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alarm:
  """Looks at the metrics of each update.

  Attributes:
    max_ratio: of `ratio_max`, a token's probability now over that at the start
      of the step; 0.0 for no bound.
    max_kl: of `kl`, from the reference, in nats per token; 0.0 for no bound.
    stop: whether to end the run for these, and not only to warn.
    min_used_fraction: lower bound of `groups/used_fraction`, the groups whose
      rewards differ. It only warns: a policy that answers everything has none.
      0.0 for no bound.
  """

  max_ratio: float
  max_kl: float
  stop: bool
  min_used_fraction: float

  def __post_init__(self) -> None:
    """Refuses bounds that every step would break, or an alarm without any."""
    if (
      self.max_kl < 0.0
      or (self.max_ratio and self.max_ratio <= 1.0)
      or not 0.0 <= self.min_used_fraction <= 1.0
      or (self.stop and not (self.max_ratio or self.max_kl))
    ):
      raise errors.ConfigError(
        "There is no such alarm.",
        where=f"--config.alarm: max_ratio={self.max_ratio}, "
        f"max_kl={self.max_kl}, "
        f"min_used_fraction={self.min_used_fraction}, stop={self.stop}",
        why="A ratio starts at 1 and a divergence at 0, and a fraction is at "
        "most 1; without a bound on ratio or divergence there is nothing to "
        "stop for.",
        fix="For example max_ratio=100, max_kl=10, min_used_fraction=0.1; "
        "0 disables a bound.",
      )

  def check(
    self, metrics: Mapping[str, float | jax.Array], *, step: int
  ) -> None:
    """Warns of what is out of bounds after `step` steps; NaN is not.

    Where nothing was trained on there is no ratio and no divergence.

    Raises:
      errors.DivergedError: if it is to stop.
    """
    used = float(metrics["groups/used_fraction"])
    if used < self.min_used_fraction:
      logging.warning(
        "ALARM at step %d: groups/used_fraction is %.4g, below "
        "--config.alarm.min_used_fraction=%g. In the others all rewards are "
        "equal or missing: questions are too easy or too hard, or the reward "
        "fails.",
        *(step, used, self.min_used_fraction),
      )
    for name, key, bound in (
      ("ratio_max", "max_ratio", self.max_ratio),
      ("kl", "max_kl", self.max_kl),
    ):
      value = float(metrics.get(name, 0.0))
      if not bound or not value > bound:
        continue
      logging.warning(
        "ALARM at step %d: %s is %.4g, above --config.alarm.%s=%g.",
        *(step, name, value, key, bound),
      )
      if self.stop:
        raise errors.DivergedError(
          f"The policy moved too far: {name} is {value:.4g}.",
          where=f"step {step}; --config.alarm.{key}={bound:g}",
          why="Updates are too large, or there are too many of them on one "
          "batch. This one is not saved.",
          fix="Lower --config.schedule.learning_rate, raise "
          "--config.loss.kl_coef, or look at the completions of the last "
          "steps. --config.alarm.stop=False only warns.",
        )
