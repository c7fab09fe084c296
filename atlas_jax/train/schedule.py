# SPDX-License-Identifier: Apache-2.0
"""Learning rate schedules."""

import math
import typing
from typing import Literal

import optax

from atlas_jax import errors

Name = Literal["constant", "linear", "cosine", "wsd"]


def make(
  *,
  learning_rate: float,
  schedule: Name,
  warmup_fraction: float,
  warmup_steps: int,
  decay_fraction: float,
  num_steps: int,
) -> optax.Schedule:
  """Returns the learning rate as a function of steps done.

  All updates of a step have its rate. A step without an update counts too, so
  the last step always has the final rate. After a linear warmup to the peak, it

    constant  stays constant;
    linear    decays linearly to zero;
    cosine    decays to zero as half a cosine, arXiv:1608.03983;
    wsd       stays constant, then decays linearly to zero, arXiv:2404.06395.

  Args:
    learning_rate: the peak.
    schedule: one of the above.
    warmup_fraction: warmup as a fraction of all steps; 0.0 if `warmup_steps` is
      set.
    warmup_steps: warmup in steps; 0 if `warmup_fraction` is set.
    decay_fraction: decay as a fraction of all steps; "wsd" only, 0.0 for the
      others.
    num_steps: total number of steps.

  Raises:
    errors.ConfigError: if the settings are invalid or contradictory.
  """
  _check(schedule, warmup_fraction, warmup_steps, decay_fraction)
  num_warmup = warmup_steps or round(warmup_fraction * num_steps)
  num_rest = max(1, num_steps - num_warmup)
  match schedule:
    case "constant":
      rest = optax.constant_schedule(learning_rate)
    case "linear":
      rest = optax.linear_schedule(learning_rate, 0.0, num_rest)
    case "cosine":
      rest = optax.cosine_decay_schedule(learning_rate, num_rest)
    case "wsd":
      num_decay = min(num_rest, max(1, round(decay_fraction * num_steps)))
      rest = optax.linear_schedule(
        learning_rate, 0.0, num_decay, num_rest - num_decay
      )
  # Starts above zero, so that the first step has an effect.
  warmup = optax.linear_schedule(
    learning_rate / max(1, num_warmup), learning_rate, max(1, num_warmup - 1)
  )
  return optax.join_schedules([warmup, rest], [num_warmup])


def num_steps(
  num_epochs: float, num_steps: int, *, steps_per_epoch: int
) -> int:
  """Returns the number of steps to train, from steps or epochs.

  Raises:
    errors.ConfigError: unless exactly one of them is set.
  """
  if min(num_epochs, num_steps) < 0 or bool(num_epochs) == bool(num_steps):
    raise errors.ConfigError(
      "Exactly one of num_epochs and loop.num_steps must be set, got "
      f"{num_epochs} and {num_steps}.",
      where="--config.num_epochs, --config.loop.num_steps",
      why="Each of them determines the length of the run.",
      fix="Set one of them above 0, and the other to 0.",
    )
  # Rounded up, so that there is at least one step.
  return num_steps or math.ceil(num_epochs * steps_per_epoch)


def _check(
  schedule: Name,
  warmup_fraction: float,
  warmup_steps: int,
  decay_fraction: float,
) -> None:
  """Rejects unknown, contradictory and ignored settings."""
  if schedule not in typing.get_args(Name):
    raise errors.ConfigError(
      f"Unknown schedule {schedule!r}.",
      where="--config.schedule.schedule",
      why=f"Supported schedules: {', '.join(typing.get_args(Name))}.",
      fix="Set one of them.",
    )
  if warmup_fraction and warmup_steps:
    raise errors.ConfigError(
      "At most one of warmup_fraction and warmup_steps can be set, got "
      f"{warmup_fraction} and {warmup_steps}.",
      where="--config.schedule.warmup_fraction, .warmup_steps",
      why="Each of them determines the length of the warmup.",
      fix="Set one of them to 0.",
    )
  if (schedule == "wsd") != (decay_fraction > 0):
    raise errors.ConfigError(
      "decay_fraction must be above 0 for schedule wsd and 0 for all others, "
      f"got {decay_fraction} for {schedule}.",
      where="--config.schedule.decay_fraction",
      why="Only wsd has a separate decay phase.",
      fix="Set it to 0.1 for wsd, for example, and to 0 otherwise.",
    )
  if warmup_steps < 0 or not (
    warmup_fraction >= 0 and warmup_fraction + decay_fraction <= 1
  ):
    raise errors.ConfigError(
      "Invalid schedule: warmup must not be negative, and warmup_fraction + "
      "decay_fraction must be at most 1.",
      where=f"--config.schedule: warmup_fraction={warmup_fraction}, "
      f"warmup_steps={warmup_steps}, decay_fraction={decay_fraction}",
      why="Warmup and decay are disjoint parts of all steps.",
      fix="Lower warmup_fraction or decay_fraction; use values >= 0.",
    )
