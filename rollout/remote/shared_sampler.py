# SPDX-License-Identifier: Apache-2.0
"""A sampler on servers, for several processes that train as one."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

from atlas_jax import types

# Takes weights and their version; arrays and mappings of them.
UpdateWeights = Callable[[Mapping[str, Any], int], object]


class SharedSampler:
  """Lets the first process ask, and gives all of them what it got."""

  def __init__(
    self,
    inner: types.Sampler | None,
    from_first: types.OnFirstProcess,
    *,
    update_weights: UpdateWeights,
  ) -> None:
    """Waits until the first process has its sampler.

    Args:
      inner: in the first process, who samples; None in the others.
      from_first: for the calls of this sampler alone.
      update_weights: hands new weights on. All processes take part in it, since
        each holds some of them.
    """
    self._inner, self._from_first = inner, from_first
    self._update_weights = update_weights
    self._version: int = from_first(lambda: self._leader().version)

  @property
  def version(self) -> int:
    """The step whose weights the servers hold."""
    return self._version

  def sample(
    self, prompts: Sequence[types.Prompt], params: types.SamplingParams
  ) -> list[list[types.Completion]]:
    """Draws completions; see `types.Sampler`."""

    def ask() -> list[list[dict[str, Any]]]:  # Any: JSON.
      groups = self._leader().sample(prompts, params)
      return [[dataclasses.asdict(c) for c in group] for group in groups]

    return [
      [types.completion(fields) for fields in group]
      for group in self._from_first(ask)
    ]

  def update_weights(
    self,
    params: Mapping[str, Any],  # Any: arrays and mappings of them.
    version: int,
  ) -> None:
    """Hands new weights on, together with the other processes."""
    self._update_weights(params, version)
    self._version = version

  def take_metrics(self) -> Mapping[str, float]:
    """Gives those of the first process; the others have none."""
    return {} if self._inner is None else self._inner.take_metrics()

  def _leader(self) -> types.Sampler:
    if self._inner is None:
      raise RuntimeError("Only the first process asks servers.")
    return self._inner
