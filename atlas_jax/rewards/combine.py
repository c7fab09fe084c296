# SPDX-License-Identifier: Apache-2.0
"""The reward of a run: a weighted sum of named rewards.

A record that lacks one of them has none: a sum without it would be on another
scale than those of the rest of its group.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import math
from typing import Any

from absl import logging

from atlas_jax import errors, types
from atlas_jax.rewards import custom, rules
from atlas_jax.rewards import rlt as rlt_reward
from atlas_jax.rewards import teaching as teaching_reward

Weighted = Mapping[str, tuple[float, types.RewardFn]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
  """The weight of each reward that we know; 0 leaves it out."""

  teaching: float
  rlt: float
  well_formed: float
  overlong: float
  exact: float
  math_verify: float


@contextlib.contextmanager
def open_reward(
  *,
  weights: Mapping[str, float],
  teaching: Mapping[str, Any],  # Any: a function's arguments, so below.
  rlt: Mapping[str, Any],
  overlong: Mapping[str, Any],
  math_verify: Mapping[str, Any],
  functions: custom.Functions,
  student: rlt_reward.Student | None,
  max_tokens: int,
) -> Iterator[types.RewardFn]:
  """Opens the rewards that have a weight, and closes their processes.

  Args:
    weights: of `Weights`. The settings of a reward without one mean nothing.
    teaching: settings of `teaching.build`.
    rlt: settings of `rlt.build`.
    overlong: settings of `rules.overlong`.
    math_verify: settings of `rules.open_math`.
    functions: the user's own, named by their paths.
    student: scores for `rlt`; None if nobody can.
    max_tokens: how long a completion can be.

  Yields:
    A function of graded records.

  Raises:
    errors.ConfigError: if a setting cannot be honoured, or there is no reward.
  """
  with contextlib.ExitStack() as opened:

    def open_named(name: str) -> types.RewardFn:
      match name:
        case "teaching":
          return teaching_reward.build(**teaching)
        case "rlt":
          return rlt_reward.build(_needed(student), **rlt)
        case "well_formed":
          return rules.well_formed
        case "overlong":
          return rules.overlong(**overlong, max_tokens=max_tokens)
        case "exact":
          return rules.exact
        case "math_verify":
          return opened.enter_context(rules.open_math(**math_verify))
      raise ValueError(f"There is no reward {name!r}.")

    rewards = {
      name: (weight, open_named(name))
      for name, weight in dataclasses.asdict(Weights(**weights)).items()
      if weight
    }
    for path, weight in functions.weights.items():
      function = custom.open_function(path, functions.limits)
      rewards[path] = (weight, opened.enter_context(function))
    yield weighted(rewards)


def weighted(rewards: Weighted) -> types.RewardFn:
  """Makes the weighted sum of rewards.

  Its `parts` hold, as they are before weighing, every reward by its name and
  what that one is made of.

  Args:
    rewards: weight and function, by name.

  Raises:
    errors.ConfigError: if there is none, or a weight is not finite.
  """
  wrong = {n: w for n, (w, _) in rewards.items() if not math.isfinite(w)}
  if wrong or not rewards:
    raise errors.ConfigError(
      "There is nothing to reward."
      if not rewards
      else "A weight is no number.",
      where="--config.reward.weights, --reward_fn",
      why=f"It is {wrong}." if wrong else "All weights are 0.",
      fix="Give a weight to at least one reward.",
    )

  def reward_fn(records: Sequence[types.TeachingRecord]) -> list[types.Reward]:
    columns = {
      name: function(records) for name, (_, function) in rewards.items()
    }
    combined = [
      _combine(rewards, dict(zip(columns, row, strict=True)))
      for _, *row in zip(records, *columns.values(), strict=True)
    ]
    _tell_missing(combined)
    return combined

  return reward_fn


def describe(weights: Mapping[str, float], functions: custom.Functions) -> str:
  """Writes a weighted sum, as "1 teaching + 0.5 my_rewards:brevity"."""
  named = {**weights, **functions.weights}
  return " + ".join(f"{w:g} {name}" for name, w in named.items() if w)


def _combine(
  rewards: Weighted, row: Mapping[str, types.Reward]
) -> types.Reward:
  """Adds up the rewards of one record."""
  total, parts = 0.0, {}
  for name, reward in row.items():
    if reward.value is None:
      return types.Reward(None, f"{name}: {reward.missing_reason}")
    if not math.isfinite(reward.value):
      return types.Reward(None, f"{name}: it is {reward.value}")
    total += rewards[name][0] * reward.value
    parts |= {**reward.parts, name: reward.value}
  return types.Reward(total, parts=parts)


def _tell_missing(rewards: Sequence[types.Reward]) -> None:
  """Logs how many rewards are missing, and why."""
  reasons = collections.Counter(
    reward.missing_reason for reward in rewards if reward.value is None
  )
  for reason, count in reasons.most_common(3):
    logging.warning(
      "%d of %d rewards are missing: %s", count, len(rewards), reason
    )


def _needed(student: rlt_reward.Student | None) -> rlt_reward.Student:
  if student is None:
    raise errors.ConfigError(
      "Nobody can score the solution for the reward rlt.",
      where="--config.reward.weights.rlt",
      why="The student's weights are not in this process.",
      fix="Load them here too, or set the weight to 0.",
    )
  return student
