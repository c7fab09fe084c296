# SPDX-License-Identifier: Apache-2.0
"""The teaching protocol on servers, for training in several processes."""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
from typing import Any

from atlas_jax import types
from atlas_jax.teaching import protocol, roles


class SharedProtocol(protocol.Protocol):
  """Samples in the first process and broadcasts the records.

  So each question proceeds through the phases by itself there, while samplers
  that all processes call could take one phase at a time only.
  """

  def __init__(
    self,
    policy: roles.Role,
    student: roles.Role,
    *args: Any,  # Any: see `protocol.Protocol`.
    samplers: tuple[types.Sampler | None, types.Sampler | None],
    from_first: types.OnFirstProcess,
    **kwargs: Any,
  ) -> None:
    """Creates the protocol in every process.

    Args:
      policy: with a sampler that all processes call, for weights and versions.
      student: likewise.
      *args: see `protocol.Protocol`.
      samplers: of policy and student in the first process; None in others.
      from_first: broadcasts from the first process; used by this object only.
      **kwargs: see `protocol.Protocol`.
    """
    super().__init__(policy, student, *args, **kwargs)
    self._from_first, self._inner = from_first, None
    if all(samplers):
      first, second = (
        dataclasses.replace(role, sampler=own)
        for role, own in zip((policy, student), samplers, strict=True)
      )
      self._inner = protocol.Protocol(first, second, *args, **kwargs)

  def run(
    self,
    questions: Sequence[types.Question],
    seed: int,
    phase: protocol.Phase = contextlib.nullcontext,
  ) -> list[types.TeachingRecord]:
    """Runs the protocol in the first process; see `protocol.Protocol.run`."""

    def run_as_json() -> list[dict[str, Any]]:  # Any: JSON.
      if self._inner is None:
        raise RuntimeError("Only the first process samples from servers.")
      return [
        dataclasses.asdict(record)
        for record in self._inner.run(questions, seed)
      ]

    with phase("rollout"):
      return list(map(types.teaching_record, self._from_first(run_as_json)))

  def keep_baselines(self, records: Sequence[types.TeachingRecord]) -> None:
    """Keeps them in the first process, which alone has cached any."""
    if self._inner:
      self._inner.keep_baselines(records)

  def get_state(self) -> dict[str, Any]:  # Any: JSON.
    """Returns the state of the first process, which alone is saved."""
    return self._inner.get_state() if self._inner else super().get_state()

  def set_state(self, state: Mapping[str, Any]) -> None:  # Any: JSON.
    """Restores it in the first process."""
    if self._inner:
      self._inner.set_state(state)
