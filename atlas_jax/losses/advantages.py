# SPDX-License-Identifier: Apache-2.0
"""Group-relative advantages of completions.

Where the student is right with every teaching, rewards differ only by the
length of the teachings, e.g. by 0.05. Divided by their deviation, these
differences would count as much as those between right and wrong answers; hence
the least deviation `min_std`.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from atlas_jax import errors

Baseline = Literal["mean", "leave_one_out"]
Scale = Literal["group", "batch", "none"]

# Added to the standard deviation, as in ATLAS and TRL.
_STD_EPSILON = 1e-4


def group_advantages(
  rewards_PC: jax.Array,
  valid_PC: jax.Array,
  *,
  baseline: Baseline,
  scale: Scale,
  min_std: float,
) -> jax.Array:
  """Computes (R - baseline) / (max(std, min_std) + 1e-4), or R - baseline.

  The baseline is the mean reward of the group, or of the other completions in
  the group ("leave_one_out"). The latter is independent of the completion, so
  the gradient is unbiased. With n rewards the two differ by n / (n - 1).

  Source: Shao et al., arXiv:2402.03300, section 4.1.2; without the division,
  Liu et al., arXiv:2503.20783; leave-one-out, Ahmadian et al.,
  arXiv:2402.14740; deviation of the batch, Liu et al., arXiv:2508.08221.

  Args:
    rewards_PC: rewards of the C completions of P prompts.
    valid_PC: bool; False where the reward is missing. Missing rewards may hold
      anything and are excluded from means and deviations.
    baseline: subtracted from each reward.
    scale: divides by the sample standard deviation of the rewards of the
      "group", or of the whole "batch" around its mean; or "none".
    min_std: least standard deviation to divide by, or 0.0, in reward units.

  Returns:
    float32[P, C]. Exactly 0 where the reward is missing, and in groups with
    fewer than two rewards or with equal rewards, which have no signal.

  Raises:
    errors.ConfigError: if `baseline` or `scale` is unknown, or `min_std` is
      negative or not used.
  """
  if baseline not in ("mean", "leave_one_out"):
    raise _unknown("baseline", baseline, "mean or leave_one_out")
  if not min_std >= 0.0 or (min_std and scale == "none"):
    raise _unknown("min_std", min_std, ">= 0, and 0 with scale=none")
  rewards_PC = jnp.asarray(rewards_PC, jnp.float32)
  count_P1 = jnp.sum(valid_PC, axis=1, keepdims=True)
  total_P1 = jnp.sum(rewards_PC, axis=1, keepdims=True, where=valid_PC)
  mean_P1 = total_P1 / jnp.maximum(count_P1, 1)
  advantages_PC = jnp.where(valid_PC, rewards_PC - mean_P1, 0.0)
  match scale:
    case "group":
      std = _std(advantages_PC, count_P1, axis=1)
    case "batch":
      count = jnp.sum(valid_PC)
      mean = jnp.sum(total_P1) / jnp.maximum(count, 1)
      std = _std(jnp.where(valid_PC, rewards_PC - mean, 0.0), count, axis=None)
    case "none":
      std = None
    case _:
      raise _unknown("scale", scale, "group, batch or none")
  if baseline == "leave_one_out":
    advantages_PC *= count_P1 / jnp.maximum(count_P1 - 1, 1)
  if std is not None:
    advantages_PC /= jnp.maximum(std, min_std) + _STD_EPSILON
  return jnp.where(has_variance(rewards_PC, valid_PC), advantages_PC, 0.0)


def has_variance(rewards_PC: jax.Array, valid_PC: jax.Array) -> jax.Array:
  """Returns whether two rewards of each group differ, bool[P, 1].

  The standard deviation cannot decide this: the mean of equal rewards is
  rounded, and dividing by 1e-4 magnifies the residual.
  """
  best_P1 = jnp.max(
    rewards_PC, axis=1, keepdims=True, where=valid_PC, initial=-jnp.inf
  )
  worst_P1 = jnp.min(
    rewards_PC, axis=1, keepdims=True, where=valid_PC, initial=jnp.inf
  )
  return best_P1 > worst_P1


def _std(
  distances_PC: jax.Array, count: jax.Array, *, axis: int | None
) -> jax.Array:
  """Computes the sample standard deviation from differences to the mean."""
  squares = jnp.sum(jnp.square(distances_PC), axis=axis, keepdims=True)
  return jnp.sqrt(squares / jnp.maximum(count - 1, 1))


def _unknown(name: str, value: object, known: str) -> errors.ConfigError:
  return errors.ConfigError(
    f"advantages.{name} must be {known}, got {value!r}.",
    where=f"--config.advantages.{name}={value}",
    why="It selects how advantages are computed from rewards.",
    fix=f"Set it to {known}.",
  )
