# SPDX-License-Identifier: Apache-2.0
"""The reward of a run: a weighted sum of named rewards.

If one term of a record is missing, its sum is missing too: a partial sum would
be on a different scale than the other rewards of the group.
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
  """Weights of the built-in rewards; a reward with weight 0 is not built."""

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
  teaching: Mapping[str, Any],  # Any: keyword arguments, also below.
  rlt: Mapping[str, Any],
  overlong: Mapping[str, Any],
  math_verify: rules.Verify | None,
  functions: custom.Functions,
  student: rlt_reward.Student | None,
  max_tokens: int,
) -> Iterator[types.RewardFn]:
  """Opens the rewards with a nonzero weight; stops their processes on exit.

  Args:
    weights: fields of `Weights`. The arguments of rewards with weight 0 are
      ignored.
    teaching: arguments of `teaching.build`.
    rlt: arguments of `rlt.build`.
    overlong: arguments of `rules.overlong`.
    math_verify: compares answers; None if math-verify is not installed.
    functions: user-defined reward functions.
    student: computes log-probabilities for `rlt`; None if not available.
    max_tokens: maximum length of a completion.

  Yields:
    A reward function of graded records.

  Raises:
    errors.ConfigError: if an argument is invalid, or all weights are 0.
  """
  with contextlib.ExitStack() as opened:

    def open_named(name: str) -> types.RewardFn:
      match name:
        case "teaching":
          return teaching_reward.build(**teaching)
        case "rlt":
          return rlt_reward.build(_require(student), **rlt)
        case "well_formed":
          return rules.well_formed
        case "overlong":
          return rules.overlong(**overlong, max_tokens=max_tokens)
        case "exact":
          return rules.exact
        case "math_verify":
          return rules.math_verify(_require_installed(math_verify))
      raise ValueError(f"Unknown reward {name!r}.")

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
  """Returns a reward function that computes a weighted sum of rewards.

  The `parts` of each reward hold the unweighted terms, by name, and the parts
  of each term. A term with one value for all records is logged, once for each
  value.

  Args:
    rewards: weight and function, by name.

  Raises:
    errors.ConfigError: if `rewards` is empty, or a weight is not finite.
  """
  wrong = {n: w for n, (w, _) in rewards.items() if not math.isfinite(w)}
  if wrong or not rewards:
    raise errors.ConfigError(
      f"Reward weights must be finite, got {wrong}."
      if wrong
      else "At least one reward must have a nonzero weight.",
      where="--config.reward.weights, --reward_fn",
      why="The reward of a run is the weighted sum of these terms.",
      fix="Set a finite, nonzero weight for at least one reward.",
    )

  constant: set[tuple[str, float]] = set()

  def reward_fn(records: Sequence[types.TeachingRecord]) -> list[types.Reward]:
    columns = {
      name: function(records) for name, (_, function) in rewards.items()
    }
    _log_constant(columns, constant)
    combined = [
      _combine(rewards, dict(zip(columns, row, strict=True)))
      for _, *row in zip(records, *columns.values(), strict=True)
    ]
    _log_missing(combined)
    return combined

  return reward_fn


def describe(weights: Mapping[str, float], functions: custom.Functions) -> str:
  """Formats a weighted sum, e.g. "1 teaching + 0.5 my_rewards:brevity"."""
  named = {**weights, **functions.weights}
  return " + ".join(f"{w:g} {name}" for name, w in named.items() if w)


def _combine(
  rewards: Weighted, row: Mapping[str, types.Reward]
) -> types.Reward:
  """Computes the weighted sum of the rewards of one record."""
  total, parts = 0.0, {}
  for name, reward in row.items():
    if reward.value is None:
      return types.Reward(None, f"{name}: {reward.missing_reason}")
    if not math.isfinite(reward.value):
      return types.Reward(None, f"{name}: value is {reward.value}")
    total += rewards[name][0] * reward.value
    parts |= {**reward.parts, name: reward.value}
  return types.Reward(total, parts=parts)


def _log_constant(
  columns: Mapping[str, Sequence[types.Reward]], logged: set[tuple[str, float]]
) -> None:
  """Logs terms that are equal for all records, unless they are in `logged`."""
  for name, column in columns.items():
    values = [reward.value for reward in column]
    if len(values) < 2 or values[0] is None or len(set(values)) > 1:
      continue
    if (name, values[0]) not in logged:
      logged.add((name, values[0]))
      logging.warning(
        "Reward %s is %g for all %d completions of a step: it does not "
        "distinguish them. Logged once for each value.",
        name,
        values[0],
        len(values),
      )


def _log_missing(rewards: Sequence[types.Reward]) -> None:
  """Logs the number of missing rewards by reason."""
  reasons = collections.Counter(
    reward.missing_reason for reward in rewards if reward.value is None
  )
  for reason, count in reasons.most_common(3):
    logging.warning(
      "Missing rewards: %d of %d: %s", count, len(rewards), reason
    )


def _require_installed(verify: rules.Verify | None) -> rules.Verify:
  if verify is None:
    raise errors.ConfigError(
      "math-verify is not installed.",
      where="--config.reward.weights.math_verify",
      why="This reward compares answers with it.",
      fix="Run pip install -r requirements/trainer.txt, or set the weight to "
      "0.",
    )
  return verify


def _require(student: rlt_reward.Student | None) -> rlt_reward.Student:
  if student is None:
    raise errors.ConfigError(
      "The reward rlt requires a student that returns log-probabilities.",
      where="--config.reward.weights.rlt",
      why="The student's weights are not loaded in this process.",
      fix="Load the student in this process, or set the weight to 0.",
    )
  return student
