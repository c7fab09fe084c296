# SPDX-License-Identifier: Apache-2.0
"""Shares the rewards computed by the first process with all processes."""

from collections.abc import Sequence
import dataclasses
import hashlib

from atlas_jax import types


def shared(
  reward_fn: types.RewardFn | None, from_first: types.OnFirstProcess
) -> types.RewardFn:
  """Returns a reward function that uses the first process's rewards everywhere.

  Judges and user functions are then called once, and a missed deadline has the
  same effect in all processes.

  Args:
    reward_fn: this process's reward function. Only the first process's results
      are used; the others' may be None, unless it takes part in computations
      over all devices.
    from_first: a broadcast used only for this reward.

  Returns:
    A reward function. It raises RuntimeError if a process has other records
    than the first.
  """

  def of_first(records: Sequence[types.TeachingRecord]) -> list[types.Reward]:
    mine = [] if reward_fn is None else reward_fn(records)
    digest = _digest(records)
    received = from_first(
      lambda: {"digest": digest, "rewards": list(map(dataclasses.asdict, mine))}
    )
    if received["digest"] != digest:
      raise RuntimeError(
        "This process has other records than the first process; the sampler "
        "must return the same completions in all processes."
      )
    return [types.Reward(**fields) for fields in received["rewards"]]

  return of_first


def _digest(records: Sequence[types.TeachingRecord]) -> str:
  """Returns a SHA-256 digest of records, ignoring their wall time."""
  digest = hashlib.sha256()
  for record in records:
    timeless = dataclasses.replace(record, seconds=0.0)
    digest.update(types.to_json_line(timeless).encode())
  return digest.hexdigest()
