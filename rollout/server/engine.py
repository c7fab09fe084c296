# SPDX-License-Identifier: Apache-2.0
"""The interface between the rollout server and its engine, vLLM or JAX."""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
from typing import Protocol

from atlas_jax import types
from rollout import wire


@dataclasses.dataclass(frozen=True)
class Facts:
  """Constants of an engine.

  `model` is the model directory; `max_model_len` bounds prompt plus completion
  tokens; `vocab_size` bounds token ids.
  """

  name: wire.Engine
  model: str
  max_model_len: int
  vocab_size: int
  tensor_parallel_size: int


class Engine(Protocol):
  """Generates the server's completions."""

  @property
  def facts(self) -> Facts:
    """The engine's constants."""
    ...

  @property
  def is_alive(self) -> bool:
    """False after an unrecoverable failure."""
    ...

  @property
  def last_progress_s(self) -> float:
    """The time of the last observed progress, by `time.monotonic()`."""
    ...

  def tokenize(self, text: str) -> list[int]:
    """Encodes a text without a chat template or special tokens."""
    ...

  def decode(self, token_ids: Sequence[int]) -> str:
    """Decodes token ids to text, without special tokens."""
    ...

  async def generate(
    self, prompts: Sequence[types.Prompt], params: types.SamplingParams
  ) -> list[list[wire.CompletionOut]]:
    """Samples `params.group_size` completions per prompt, in prompt order.

    Raises:
      errors.RolloutError: if the engine fails.
    """
    ...

  async def load(self, directory: pathlib.Path, version: int) -> None:
    """Replaces the weights in place and resets the prefix cache.

    Requests that are still running, because they were given up, are aborted.

    Raises:
      errors.CheckpointError: if the weights are invalid and nothing changed.
      errors.RolloutError: if the prefix cache still holds keys and values of
        the old weights.
    """
    ...

  async def reset_prefix_cache(self) -> bool:
    """Clears cached keys and values of earlier prompts.

    Returns:
      False if running requests still use them, and nothing changed.
    """
    ...

  def metrics(self) -> Mapping[str, float]:
    """Returns engine-specific values for GET /metrics, by name."""
    ...

  def close(self) -> None:
    """Stops the engine and frees its resources."""
    ...
