# SPDX-License-Identifier: Apache-2.0
"""What a rollout server asks of an engine, be it vLLM or the JAX sampler."""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
from typing import Protocol

from atlas_jax import types
from rollout import wire


@dataclasses.dataclass(frozen=True)
class Facts:
  """What never changes about an engine.

  `model` is the directory it was started on; `max_model_len` bounds prompt and
  completion together; `vocab_size` bounds token ids.
  """

  name: wire.Engine
  model: str
  max_model_len: int
  vocab_size: int
  tensor_parallel_size: int


class Engine(Protocol):
  """What writes completions behind the server."""

  @property
  def facts(self) -> Facts:
    """What never changes."""
    ...

  @property
  def is_alive(self) -> bool:
    """False once it can never work again."""
    ...

  @property
  def last_progress_s(self) -> float:
    """When it last gave a sign of work, by `time.monotonic()`."""
    ...

  def tokenize(self, text: str) -> list[int]:
    """Encodes a text as it is, without any template."""
    ...

  async def generate(
    self, prompts: Sequence[types.Prompt], params: types.SamplingParams
  ) -> list[list[wire.CompletionOut]]:
    """Draws `params.group_size` completions of each prompt, in order.

    Raises:
      errors.RolloutError: if the engine fails.
    """
    ...

  async def load(self, directory: pathlib.Path, version: int) -> None:
    """Replaces the weights in place, and forgets what the old ones cached.

    Raises:
      errors.CheckpointError: if they cannot be used and nothing was changed.
    """
    ...

  async def reset_prefix_cache(self) -> None:
    """Forgets what was cached of earlier prompts."""
    ...

  def metrics(self) -> Mapping[str, float]:
    """Gives numbers of its own for GET /metrics, by name."""
    ...

  def close(self) -> None:
    """Stops, and frees what it holds."""
    ...
