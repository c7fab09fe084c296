# SPDX-License-Identifier: Apache-2.0
"""One reward for several processes: the first one's counts for all."""

from collections.abc import Sequence
import dataclasses
import hashlib

from atlas_jax import types


def shared(
  reward_fn: types.RewardFn | None, from_first: types.OnFirstProcess
) -> types.RewardFn:
  """Gives every process the rewards that the first one finds.

  A judge or a function of the user's is asked once then, and a deadline that
  passes in one process passes in all.

  Args:
    reward_fn: of this process. In others than the first, what it gives is not
      looked at: it need only do its part of what takes all devices, or be None.
    from_first: for the calls of this reward alone.

  Returns:
    A reward function. It raises RuntimeError where the records of a process
    are not those of the first.
  """

  def of_first(records: Sequence[types.TeachingRecord]) -> list[types.Reward]:
    mine = [] if reward_fn is None else reward_fn(records)
    digest = _digest(records)
    told = from_first(
      lambda: {"digest": digest, "rewards": list(map(dataclasses.asdict, mine))}
    )
    if told["digest"] != digest:
      raise RuntimeError(
        "This process sampled other records than the first one; the sampler "
        "must give all processes the same."
      )
    return [types.Reward(**fields) for fields in told["rewards"]]

  return of_first


def _digest(records: Sequence[types.TeachingRecord]) -> str:
  """Names the values of records, but for how long they took."""
  digest = hashlib.sha256()
  for record in records:
    timeless = dataclasses.replace(record, seconds=0.0)
    digest.update(types.to_json_line(timeless).encode())
  return digest.hexdigest()
