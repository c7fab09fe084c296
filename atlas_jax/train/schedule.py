# SPDX-License-Identifier: Apache-2.0
"""The learning rate as a function of updates done."""

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
  warmup_updates: int,
  decay_fraction: float,
  num_updates: int,
) -> optax.Schedule:
  """Makes the learning rate as a function of updates done.

  It rises linearly to its peak, and then

    constant  stays;
    linear    falls to zero along a line;
    cosine    falls to zero along half a cosine, arXiv:1608.03983;
    wsd       stays, then falls to zero along a line, arXiv:2404.06395.

  Args:
    learning_rate: the peak.
    schedule: one of these.
    warmup_fraction: the part of all updates that rises; 0.0 if told in updates.
    warmup_updates: the same as a number; 0 if told as a fraction.
    decay_fraction: the part of all updates that falls; of "wsd" alone, 0.0
      for the others.
    num_updates: in all.

  Raises:
    errors.ConfigError: if the settings contradict each other.
  """
  _check(schedule, warmup_fraction, warmup_updates, decay_fraction)
  num_warmup = warmup_updates or round(warmup_fraction * num_updates)
  num_rest = max(1, num_updates - num_warmup)
  match schedule:
    case "constant":
      rest = optax.constant_schedule(learning_rate)
    case "linear":
      rest = optax.linear_schedule(learning_rate, 0.0, num_rest)
    case "cosine":
      rest = optax.cosine_decay_schedule(learning_rate, num_rest)
    case "wsd":
      num_decay = min(num_rest, max(1, round(decay_fraction * num_updates)))
      rest = optax.linear_schedule(
        learning_rate, 0.0, num_decay, num_rest - num_decay
      )
  # The first update is not lost on a rate of zero.
  warmup = optax.linear_schedule(
    learning_rate / max(1, num_warmup), learning_rate, max(1, num_warmup - 1)
  )
  return optax.join_schedules([warmup, rest], [num_warmup])


def num_steps(
  num_epochs: float, num_steps: int, *, steps_per_epoch: int
) -> int:
  """Reads how long to train, told in epochs or in steps.

  Raises:
    errors.ConfigError: if it is told in neither way, or in both.
  """
  if min(num_epochs, num_steps) < 0 or bool(num_epochs) == bool(num_steps):
    raise errors.ConfigError(
      "The length of the run must be told in one way.",
      where="--config.num_epochs, --config.loop.num_steps",
      why=f"They are {num_epochs} and {num_steps}.",
      fix="Set one of them, and the other to 0.",
    )
  # A part of an epoch is rounded up, so that some step is always done.
  return num_steps or math.ceil(num_epochs * steps_per_epoch)


def _check(
  schedule: Name,
  warmup_fraction: float,
  warmup_updates: int,
  decay_fraction: float,
) -> None:
  """Refuses what does not exist, contradicts itself or would be ignored."""
  if schedule not in typing.get_args(Name):
    raise errors.ConfigError(
      f"There is no schedule {schedule!r}.",
      where="--config.schedule.schedule",
      why=f"The schedules are {', '.join(typing.get_args(Name))}.",
      fix="Name one of them.",
    )
  if warmup_fraction and warmup_updates:
    raise errors.ConfigError(
      "The warm-up is told in two ways.",
      where="--config.schedule.warmup_fraction, .warmup_updates",
      why=f"They are {warmup_fraction} and {warmup_updates}.",
      fix="Set one of them to 0.",
    )
  if (schedule == "wsd") != (decay_fraction > 0):
    raise errors.ConfigError(
      "The schedule wsd has a decay_fraction, and no other has.",
      where="--config.schedule.decay_fraction",
      why=f"It is {decay_fraction}, and the schedule is {schedule}.",
      fix="Set it above 0 for wsd, for example to 0.1, and else to 0.",
    )
  if warmup_updates < 0 or not (
    warmup_fraction >= 0 and warmup_fraction + decay_fraction <= 1
  ):
    raise errors.ConfigError(
      "The learning rate cannot rise and fall like this.",
      where="--config.schedule",
      why=f"warmup_fraction={warmup_fraction}, "
      f"warmup_updates={warmup_updates}, decay_fraction={decay_fraction}.",
      fix="None may be below 0, and the fractions sum to 1 at most.",
    )
