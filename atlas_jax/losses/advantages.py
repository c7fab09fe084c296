# SPDX-License-Identifier: Apache-2.0
"""How much better each completion did than the others of its prompt."""

from typing import Literal

import jax
import jax.numpy as jnp

from atlas_jax import errors

Baseline = Literal["mean", "leave_one_out"]
Scale = Literal["group", "batch", "none"]

# Added to the standard deviation, as ATLAS and TRL do.
_STD_EPSILON = 1e-4


def group_advantages(
  rewards_PC: jax.Array,
  valid_PC: jax.Array,
  *,
  baseline: Baseline,
  scale: Scale,
) -> jax.Array:
  """Computes (R - baseline) / (std + 1e-4), or without the division.

  The baseline is the mean of the group, or of the others of the group: then it
  does not depend on the completion that it is taken from, and the gradient has
  no bias. The two differ by the factor n / (n - 1).

  Source: Shao et al., arXiv:2402.03300, section 4.1.2; without the division,
  Liu et al., arXiv:2503.20783; leaving one out, Ahmadian et al.,
  arXiv:2402.14740; by the deviation of the batch, Liu et al., arXiv:2508.08221.

  Args:
    rewards_PC: rewards of the C completions of P prompts.
    valid_PC: bool; False where the reward is missing. Such a reward may hold
      anything: it is no part of any mean or deviation.
    baseline: what is taken from each reward.
    scale: divides by the sample standard deviation of the rewards of the
      "group", or of the whole "batch" around their one mean; or "none".

  Returns:
    float32[P, C]. Exactly 0 where the reward is missing, and in groups with
    fewer than two rewards or with all rewards equal: there is nothing to learn.

  Raises:
    errors.ConfigError: if there is no such baseline or scale.
  """
  if baseline not in ("mean", "leave_one_out"):
    raise _unknown("baseline", baseline, "mean or leave_one_out")
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
    advantages_PC /= std + _STD_EPSILON
  return jnp.where(has_variance(rewards_PC, valid_PC), advantages_PC, 0.0)


def has_variance(rewards_PC: jax.Array, valid_PC: jax.Array) -> jax.Array:
  """Tells for each group, bool[P, 1], whether two of its rewards differ.

  Their deviation would not tell: the mean of equal rewards is rounded, and
  dividing by 1e-4 magnifies what is left of them.
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
  """Computes the sample standard deviation from distances to the mean."""
  squares = jnp.sum(jnp.square(distances_PC), axis=axis, keepdims=True)
  return jnp.sqrt(squares / jnp.maximum(count - 1, 1))


def _unknown(name: str, value: object, known: str) -> errors.ConfigError:
  return errors.ConfigError(
    f"There is no {name} {value!r}.",
    where=f"--config.advantages.{name}={value}",
    why="It names how advantages are computed from rewards.",
    fix=f"Set it to {known}.",
  )
