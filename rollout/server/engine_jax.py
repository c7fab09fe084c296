# SPDX-License-Identifier: Apache-2.0
"""The JAX engine: runs the JAX sampler in one thread, one batch at a time.

It does not need vLLM, so the server runs wherever JAX does. It reports progress
only when a batch finishes: `hang_s` must exceed the duration of the longest
batch, including compilation.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
import concurrent.futures
import pathlib
import time
from typing import TypeVar

from atlas_jax import chat, errors, sharding, types
from atlas_jax.models import decoder
from conversion import load
from rollout import jax_sampler, wire
from rollout.server import engine

_T = TypeVar("_T")


class JaxEngine:
  """See `engine.Engine`."""

  is_alive = True  # The engine lives and dies with this process.

  def __init__(
    self,
    directory: pathlib.Path,
    *,
    dtype: str,
    max_model_len: int | None,
    max_rows: int,
    ignore_fields: Collection[str] = (),
  ) -> None:
    """Loads a model onto all devices of this process.

    Args:
      directory: a model in Hugging Face format.
      dtype: of weights and activations.
      max_model_len: of prompt plus completion; None for the model's maximum.
      max_rows: maximum number of completions decoded at once.
      ignore_fields: fields of config.json that are treated as absent.

    Raises:
      errors.AtlasError: if the model or its tokenizer cannot be loaded.
    """
    config, _ = load.read_config(directory, ignore_fields=ignore_fields)
    longest = config.max_positions
    if max_model_len is not None and max_model_len > longest:
      raise errors.ConfigError(
        f"--max_model_len must be at most {longest}, got {max_model_len}.",
        where="--max_model_len",
        why=f"max_position_embeddings of {directory} is {longest}.",
        fix=f"Set --max_model_len={longest} or less.",
      )
    self.last_progress_s = time.monotonic()
    # Prompts arrive rendered.
    self._tokenizer = chat.load_tokenizer(directory, with_template=False)
    self._model = decoder.build(
      config, dtype=dtype, attention="xla", remat="none", unroll=1
    )
    mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
    self.facts = engine.Facts(
      name="jax",
      model=str(directory),
      max_model_len=max_model_len or longest,
      vocab_size=config.vocab_size,
      tensor_parallel_size=mesh.shape["tensor"],
    )
    self._shardings = sharding.of_params(mesh, self._model.abstract_params)
    self._dtype = dtype
    self._sampler = jax_sampler.JaxSampler(
      self._model,
      self._read(directory),
      mesh=mesh,
      stop_token_ids=chat.stop_token_ids(self._tokenizer, directory),
      max_rows=max_rows,
    )
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "jax-engine")

  def tokenize(self, text: str) -> list[int]:
    """Encodes a text without a chat template or special tokens."""
    return self._tokenizer.encode(text, add_special_tokens=False)

  def decode(self, token_ids: Sequence[int]) -> str:
    """Decodes token ids to text, without special tokens."""
    return chat.decode(self._tokenizer, token_ids)

  async def generate(
    self, prompts: Sequence[types.Prompt], params: types.SamplingParams
  ) -> list[list[wire.CompletionOut]]:
    """Samples completions; concurrent requests run one after another."""
    return await self._in_thread(
      lambda: [
        [_to_wire(completion) for completion in group]
        for group in self._sampler.sample(prompts, params)
      ]
    )

  async def load(self, directory: pathlib.Path, version: int) -> None:
    """Replaces the weights, in the sampling thread."""
    await self._in_thread(
      lambda: self._sampler.update_weights(self._read(directory), version)
    )

  async def reset_prefix_cache(self) -> bool:
    """Returns True: prompts are not cached across requests."""
    return True

  def metrics(self) -> Mapping[str, float]:
    """Returns the number of compiled programs."""
    return {"programs": self._sampler.num_programs}

  def close(self) -> None:
    """Cancels waiting batches; the running one finishes."""
    self._thread.shutdown(wait=False, cancel_futures=True)

  def _read(self, directory: pathlib.Path) -> decoder.Params:
    return load.load(
      directory,
      self._model,
      param_dtype=self._dtype,
      shardings=self._shardings,
    )

  async def _in_thread(self, work: Callable[[], _T]) -> _T:
    def measured() -> _T:
      self.last_progress_s = time.monotonic()
      result = work()
      self.last_progress_s = time.monotonic()
      return result

    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(self._thread, measured)


def _to_wire(completion: types.Completion) -> wire.CompletionOut:
  return wire.CompletionOut(
    token_ids=list(completion.token_ids),
    logprobs=list(completion.logprobs),
    model_logprobs=list(completion.model_logprobs),
    finish_reason=completion.finish_reason,
  )
