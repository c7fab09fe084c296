# SPDX-License-Identifier: Apache-2.0
"""A sampler on rollout servers for multi-process training."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

from atlas_jax import types

# Takes nested mappings of arrays, and their version.
UpdateWeights = Callable[[Mapping[str, Any], int], object]


class SharedSampler:
  """Samples in the first process and broadcasts the completions."""

  def __init__(
    self,
    inner: types.Sampler | None,
    from_first: types.OnFirstProcess,
    *,
    update_weights: UpdateWeights | None,
  ) -> None:
    """Waits until the first process has its sampler.

    Args:
      inner: the sampler of the first process; None in the others.
      from_first: broadcasts from the first process; used by this sampler only.
      update_weights: publishes new weights. All processes call it, since each
        holds some shards. None for a student, whose weights are fixed.
    """
    self._inner, self._from_first = inner, from_first
    self._update_weights = update_weights
    self._version, self._context_length = from_first(
      lambda: [self._leader().version, self._leader().context_length]
    )

  @property
  def inner(self) -> types.Sampler | None:
    """The sampler of the first process; None in the others."""
    return self._inner

  @property
  def version(self) -> int:
    """The step of the weights that the servers hold."""
    return self._version

  @property
  def context_length(self) -> int:
    """The smallest max_model_len of the servers."""
    return self._context_length

  @property
  def is_concurrent(self) -> bool:
    """False: processes take part in every call, in the same order."""
    return False

  def sample(
    self, prompts: Sequence[types.Prompt], params: types.SamplingParams
  ) -> list[list[types.Completion]]:
    """Samples completions; see `types.Sampler`."""

    def sample_as_json() -> list[list[dict[str, Any]]]:  # Any: JSON.
      groups = self._leader().sample(prompts, params)
      return [[dataclasses.asdict(c) for c in group] for group in groups]

    return [
      [types.completion(fields) for fields in group]
      for group in self._from_first(sample_as_json)
    ]

  def update_weights(
    self,
    params: Mapping[str, Any],  # Any: arrays and mappings of them.
    version: int,
  ) -> None:
    """Publishes new weights, together with the other processes."""
    if self._update_weights is None:
      raise RuntimeError("A student's weights are never replaced.")
    self._update_weights(params, version)
    self._version = version

  def take_metrics(self) -> Mapping[str, float]:
    """Returns metrics in the first process, and an empty dict in the others."""
    return {} if self._inner is None else self._inner.take_metrics()

  def _leader(self) -> types.Sampler:
    if self._inner is None:
      raise RuntimeError("Only the first process samples from servers.")
    return self._inner
