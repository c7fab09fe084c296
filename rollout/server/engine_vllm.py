# SPDX-License-Identifier: Apache-2.0
"""The vLLM engine; the only module of the rollout server that imports vllm.

vLLM's engine core runs in a separate process. Weights are reloaded in place,
between two batches, from a directory of safetensors files.
"""
# pyright runs in the trainer's environment, where vLLM is not installed.
# pyright: reportMissingImports=false

import asyncio
from collections.abc import Mapping, Sequence
import hashlib
import itertools
import pathlib
import time
from typing import Any, Literal

import vllm
from vllm import exceptions, inputs, platforms, sampling_params
from vllm.engine import arg_utils
from vllm.v1.engine import async_llm
from vllm.v1.metrics import loggers, stats

from atlas_jax import chat, errors, types
from rollout import wire
from rollout.server import engine

VERSION = vllm.__version__
OLDEST = (0, 32)


class TiedHead:
  """Worker extension that refreshes a tied head after a weight reload.

  On a CPU the LM head multiplies by a packed copy of its weight. A weight tied
  to the embedding is not in the checkpoint, so vLLM's reload does not repack
  it.
  """

  model_runner: Any  # Any: vLLM's, of the worker that this is mixed into.

  def refresh_tied_head(self) -> None:
    """Packs the head again from the shared embedding weight."""
    model = self.model_runner.get_model()
    if platforms.current_platform.is_cpu():
      head = model.lm_head
      if head.weight is model.model.embed_tokens.weight:
        head.quant_method.process_weights_after_loading(head)


class VllmEngine:
  """See `engine.Engine`."""

  def __init__(
    self,
    directory: pathlib.Path,
    *,
    dtype: Literal["float32", "bfloat16"],
    max_model_len: int | None,
    tensor_parallel_size: int,
    gpu_memory_utilization: float,
    kv_cache_gib: float | None,
    enforce_eager: bool,
  ) -> None:
    """Starts vLLM's engine, which takes seconds to minutes.

    Args:
      directory: a model in Hugging Face format.
      dtype: of weights and activations.
      max_model_len: of prompt plus completion; None for the model's maximum.
      tensor_parallel_size: number of devices that share the weights.
      gpu_memory_utilization: fraction of each device's memory that vLLM uses.
      kv_cache_gib: size of the KV cache; None for the rest of that fraction.
      enforce_eager: disables torch.compile and CUDA graphs: starts faster,
        runs slower.

    Raises:
      errors.ConfigError: if vLLM is too old, rejects these settings, or the
        tokenizer cannot be loaded.
    """
    _check_version()
    # Prompts arrive rendered.
    self._tokenizer = chat.load_tokenizer(directory, with_template=False)
    self._stop_token_ids = list(chat.stop_token_ids(self._tokenizer, directory))
    self._progress = _Progress()
    self._request_ids = itertools.count()
    arguments = _arguments(
      model=str(directory),
      dtype=dtype,
      tensor_parallel_size=tensor_parallel_size,
      gpu_memory_utilization=gpu_memory_utilization,
      enforce_eager=enforce_eager,
    )
    if max_model_len is not None:
      arguments.max_model_len = max_model_len
    if kv_cache_gib is not None:
      arguments.kv_cache_memory_bytes = int(kv_cache_gib * 2**30)
    self._llm = _start(arguments, self._progress)
    model_config = self._llm.model_config
    self.facts = engine.Facts(
      name="vllm",
      model=str(directory),
      max_model_len=model_config.max_model_len,
      vocab_size=model_config.get_vocab_size(),
      tensor_parallel_size=tensor_parallel_size,
    )

  @property
  def is_alive(self) -> bool:
    """False once vLLM's engine process has exited."""
    return not self._llm.errored

  @property
  def last_progress_s(self) -> float:
    """The time of vLLM's last engine step."""
    return self._progress.last_s

  def tokenize(self, text: str) -> list[int]:
    """Encodes a text without a chat template or special tokens."""
    return self._tokenizer.encode(text, add_special_tokens=False)

  def decode(self, token_ids: Sequence[int]) -> str:
    """Decodes token ids to text, without special tokens."""
    return chat.decode(self._tokenizer, token_ids)

  async def generate(
    self, prompts: Sequence[types.Prompt], params: types.SamplingParams
  ) -> list[list[wire.CompletionOut]]:
    """Samples completions; vLLM batches concurrent requests."""
    tasks = [
      asyncio.create_task(self._generate_one(prompt, params))
      for prompt in prompts
    ]
    try:
      return await asyncio.gather(*tasks)
    finally:
      for task in tasks:  # If one fails, cancel the others.
        task.cancel()

  async def load(self, directory: pathlib.Path, version: int) -> None:
    """Replaces the weights in place; aborts what still runs."""
    del version
    await self._llm.pause_generation(mode="abort", clear_cache=False)
    await self._llm.collective_rpc(
      "reload_weights", kwargs={"weights_path": str(directory)}
    )
    await self._llm.collective_rpc("refresh_tied_head")
    if not await self.reset_prefix_cache():
      raise errors.RolloutError(
        "vLLM kept its prefix cache after a weight update.",
        where=str(directory),
        why="Requests still use it, although they were aborted.",
        fix="Restart the server: its completions would mix two versions.",
      )
    await self._llm.resume_generation()

  async def reset_prefix_cache(self) -> bool:
    """Clears cached keys and values; False if requests still use them."""
    return await self._llm.reset_prefix_cache()

  def metrics(self) -> Mapping[str, float]:
    """Returns vLLM's scheduler statistics of its last step."""
    return self._progress.metrics

  def close(self) -> None:
    """Stops vLLM's engine process."""
    self._llm.shutdown()

  async def _generate_one(
    self, prompt: types.Prompt, params: types.SamplingParams
  ) -> list[wire.CompletionOut]:
    outputs = await self.draw(prompt, params)
    own = (params.temperature, params.top_p, params.top_k) == (1, 1, 0)
    greedy = params.temperature == 0.0
    completions = [_to_wire(output, greedy or own) for output in outputs]
    # vLLM requires n = 1 for greedy sampling; the copies are identical.
    return completions * params.group_size if greedy else completions

  async def draw(
    self, prompt: types.Prompt, params: types.SamplingParams
  ) -> list[vllm.CompletionOutput]:
    """Returns vLLM's outputs for a prompt; only one if greedy."""
    # vLLM seeds a separate generator with seed + i for the i-th completion, so
    # results do not depend on the other requests in the batch.
    sampling = sampling_params.SamplingParams(
      n=1 if params.temperature == 0.0 else params.group_size,
      max_tokens=params.max_completion_tokens,
      temperature=params.temperature,
      top_p=params.top_p,
      top_k=params.top_k,
      seed=_seed(params.seed, prompt.row_id),
      stop_token_ids=self._stop_token_ids,
      logprobs=0,
      detokenize=False,
      output_kind=sampling_params.RequestOutputKind.FINAL_ONLY,
    )
    outputs = self._llm.generate(
      inputs.TokensPrompt(prompt_token_ids=list(prompt.token_ids)),
      sampling,
      str(next(self._request_ids)),
    )
    try:
      final = [output async for output in outputs][-1]
    except exceptions.VLLMError as error:
      raise _failed(str(error)) from error
    return final.outputs


class _Progress(loggers.StatLoggerBase):
  """Records the time and statistics of vLLM's engine steps."""

  def __init__(self) -> None:
    self.last_s = time.monotonic()
    self.metrics: dict[str, float] = {}
    self._queue_s = 0.0

  def record(
    self,
    scheduler_stats: stats.SchedulerStats | None,
    iteration_stats: stats.IterationStats | None,
    mm_cache_stats: stats.MultiModalCacheStats | None = None,
    engine_idx: int = 0,
  ) -> None:
    """Stores the time and the scheduler statistics of a step."""
    del mm_cache_stats, engine_idx
    self.last_s = time.monotonic()
    if iteration_stats is not None:
      done = iteration_stats.finished_requests
      self._queue_s += sum(request.queued_time for request in done)
    if scheduler_stats is not None:
      self.metrics = {
        "queue_seconds_total": self._queue_s,
        "running_requests": scheduler_stats.num_running_reqs,
        "waiting_requests": scheduler_stats.num_waiting_reqs,
        "kv_cache_usage": scheduler_stats.kv_cache_usage,
      }

  def log_engine_initialized(self) -> None:
    """Does nothing; required by the interface."""


def _arguments(**settings: Any) -> arg_utils.AsyncEngineArgs:  # Any: vLLM's.
  """Returns engine arguments: the given settings plus our constants."""
  arguments = arg_utils.AsyncEngineArgs(
    # Log-probabilities after temperature, top-p and top-k, as documented in
    # `types.Completion`.
    logprobs_mode="processed_logprobs",
    # Ignores the checkpoint's generation_config.json.
    generation_config="vllm",
    skip_tokenizer_init=True,
    trust_remote_code=False,
    worker_extension_cls=f"{__name__}.{TiedHead.__name__}",
    **settings,
  )
  if platforms.current_platform.is_cpu():
    # For a partial prompt vLLM discards the sampled token and rewinds the
    # generator, which torch does not support for CPU generators.
    arguments.enable_chunked_prefill = False
  return arguments


def _start(
  arguments: arg_utils.AsyncEngineArgs, progress: _Progress
) -> async_llm.AsyncLLM:
  try:
    return async_llm.AsyncLLM.from_engine_args(
      arguments, stat_loggers=[lambda *_: progress]
    )
  except (ValueError, RuntimeError, exceptions.VLLMError) as error:
    raise errors.ConfigError(
      "vLLM failed to start.",
      where=arguments.model,
      why=str(error).splitlines()[0],
      fix="See vLLM's log above. If it ran out of memory, lower "
      "--max_model_len, --gpu_memory_utilization or --kv_cache_gib.",
    ) from error


def _seed(seed: int, row_id: str) -> int:
  """Hashes seed and row id to 62 bits, so that rows get separate streams."""
  raw = hashlib.sha256(f"{seed}:{row_id}".encode()).digest()
  return int.from_bytes(raw[:8], "big") >> 2


def _to_wire(
  output: vllm.CompletionOutput, is_models_own: bool
) -> wire.CompletionOut:
  """Converts an output, with the log-probability of each sampled token."""
  token_ids, reason = list(output.token_ids), output.finish_reason
  positions = output.logprobs
  if positions is None or reason not in ("stop", "length"):
    raise _failed(f"finish_reason={reason!r}, or log-probabilities missing.")
  logprobs = [
    position[token_id].logprob
    for position, token_id in zip(positions, token_ids, strict=True)
    if position
  ]
  return wire.CompletionOut(
    token_ids=token_ids,
    logprobs=logprobs,
    model_logprobs=logprobs if is_models_own else None,
    finish_reason=reason,
  )


def _failed(why: str) -> errors.RolloutError:
  return errors.RolloutError(
    "vLLM failed to complete a request.",
    where="vLLM engine",
    why=why,
    fix="See the server's log; if /health is not ok, restart the server.",
  )


def _check_version() -> None:
  found = tuple(int(part) for part in VERSION.split(".")[:2])
  if found < OLDEST:
    raise errors.ConfigError(
      f"vLLM {VERSION} is too old.",
      where=str(vllm.__file__),
      why=f"Reloading weights in place needs at least {OLDEST[0]}.{OLDEST[1]}.",
      fix="Run bash scripts/install_rollout.sh.",
    )
