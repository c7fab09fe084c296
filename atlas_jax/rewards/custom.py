# SPDX-License-Identifier: Apache-2.0
"""User-defined reward functions, named on the command line.

Each runs in a separate process with a deadline. A reward that is not returned,
or is not finite, is missing; repeated failures stop the run.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import itertools
import math
import pathlib
import re
from typing import Any

from absl import logging

from atlas_jax import errors, types
from atlas_jax.rewards import isolated

# Limit on consecutive calls that return no usable reward.
_MAX_FAILURES = 8
# `module:function` or `FILE.py:function`, then a weight.
_OPTION = re.compile(
  r"(?P<path>(?P<file>[^:=]+\.py)?(?(file)|[\w.]+):\w+)(?:=(?P<weight>[^=]+))?"
)


@dataclasses.dataclass(frozen=True)
class Functions:
  """User-defined reward functions: weights by `module:function` or file."""

  weights: Mapping[str, float]
  limits: isolated.Limits


def parse(
  options: Sequence[str], *, timeout_s: float, memory_gb: float
) -> Functions:
  """Parses --reward_fn flags: `module:function` or `FILE.py:function`.

  Either may be followed by `=weight`.

  Raises:
    errors.ConfigError: if a flag has another form, names a missing file or is
      repeated, or a limit is out of range.
  """
  weights = {}
  for option in options:
    match = _OPTION.fullmatch(option)
    weight = _number(match["weight"] or "1") if match else None
    if match is None or weight is None or match["path"] in weights:
      raise errors.ConfigError(
        f"Invalid or repeated --reward_fn={option}.",
        where="--reward_fn",
        why="The form is FILE.py:function or module:function, then =weight "
        "with a finite weight; each function may be given once.",
        fix="For example, --reward_fn=reward.py:brevity=0.5",
      )
    if match["file"] and not pathlib.Path(match["file"]).is_file():
      raise errors.ConfigError(
        f"File {match['file']} does not exist.",
        where=f"--reward_fn={option}",
        why=f"The path is relative to {pathlib.Path.cwd()}.",
        fix="Correct the path.",
      )
    weights[match["path"]] = weight
  if not (0.0 < timeout_s < math.inf and 0.0 <= memory_gb < math.inf):
    raise errors.ConfigError(
      "reward_fn_timeout_s must be > 0 and reward_fn_memory_gb >= 0, both "
      "finite.",
      where=f"--reward_fn_timeout_s={timeout_s}, "
      f"--reward_fn_memory_gb={memory_gb}",
      why="A call without a deadline could block training.",
      fix="Set a positive number of seconds, and gigabytes, or 0 for no memory "
      "limit.",
    )
  limits = isolated.Limits(timeout_s, int(memory_gb * 10**9))
  return Functions(weights, limits)


@contextlib.contextmanager
def open_function(
  path: str, limits: isolated.Limits
) -> Iterator[types.RewardFn]:
  """Starts the process of a reward function, and stops it on exit.

  Args:
    path: `module:function` or `FILE.py:function`, a `types.RewardFn` or a
      function that returns plain numbers. It is called with the records of one
      question at a time.
    limits: of each call.

  Yields:
    The reward function. It raises ConfigError after too many consecutive failed
    calls.

  Raises:
    errors.ConfigError: if the function cannot be imported.
  """
  num_failures = 0

  def rewards(records: Sequence[types.TeachingRecord]) -> list[types.Reward]:
    nonlocal num_failures
    answer = worker.ask([dataclasses.asdict(record) for record in records])
    rewarded = _read(answer, len(records))
    if any(reward.value is not None for reward in rewarded):
      num_failures = 0
    else:
      num_failures += 1
      reason = rewarded[0].missing_reason
      logging.warning("Reward function %s: %s.", path, reason)
      if num_failures == _MAX_FAILURES:
        raise _always_fails(path, reason)
    return rewarded

  def reward_fn(records: Sequence[types.TeachingRecord]) -> list[types.Reward]:
    groups = itertools.groupby(records, lambda r: r.question.row_id)
    return [reward for _, group in groups for reward in rewards(list(group))]

  with isolated.Worker(path, "records", limits) as worker:
    yield reward_fn


def _read(answer: isolated.Answer, num_records: int) -> list[types.Reward]:
  """Validates the rewards that a function returned for `num_records`."""
  if answer.failure:
    return [types.Reward(None, answer.failure)] * num_records
  if len(answer.value) != num_records:
    why = f"returned {len(answer.value)} rewards for {num_records} records"
    return [types.Reward(None, why)] * num_records
  return [_finite(fields) for fields in answer.value]


def _finite(fields: dict[str, Any]) -> types.Reward:  # Any: JSON.
  """Parses one reward; it is missing unless all its numbers are finite."""
  reward = types.Reward(**fields)
  for value in (reward.value, *reward.parts.values()):
    if value is not None and not math.isfinite(value):
      return types.Reward(None, f"returned {value}")
  return reward


def _always_fails(path: str, reason: str) -> errors.ConfigError:
  return errors.ConfigError(
    f"A reward function failed {_MAX_FAILURES} times in a row.",
    where=f"--reward_fn={path}",
    why=f"Last failure: {reason}.",
    fix="Fix the function (any traceback is above), or raise "
    "--reward_fn_timeout_s or --reward_fn_memory_gb.",
  )


def _number(text: str) -> float | None:
  try:
    value = float(text)
  except ValueError:
    return None
  return value if math.isfinite(value) else None
