# SPDX-License-Identifier: Apache-2.0
"""The vLLM process of scripts/bench/rollout.py, which starts it.

One vLLM engine runs behind our server, and is also called directly for each
request line on stdin. Prints JSON lines: first the port, then the tokens and
seconds of each request. Exits at the end of stdin.
"""

import asyncio
import json
import os
import pathlib
import signal
import socket
import sys
import time

from absl import flags
import fastapi

from atlas_jax import types
from rollout import manifest, wire
from rollout.server import (
  admission,
  engine_vllm,
  listen,
  service,
  weight_channel,
)
from rollout.server import app as server_app
from scripts import program

_DIRECTORY = flags.DEFINE_string(
  "directory", None, "A Hugging Face model.", required=True
)
_EAGER = flags.DEFINE_bool("eager", True, "Whether vLLM runs uncompiled.")


def main() -> None:
  """Serves, and handles requests on stdin until its end."""
  directory = pathlib.Path(_DIRECTORY.value)
  engine = engine_vllm.VllmEngine(
    directory,
    dtype="float32",
    max_model_len=None,
    tensor_parallel_size=1,
    gpu_memory_utilization=0.5,
    kv_cache_gib=1.0,
    enforce_eager=_EAGER.value,
  )
  try:
    with listen.bind("127.0.0.1", 0) as bound, listen.stoppable():
      asyncio.run(_run(_make_app(engine, directory), bound, engine))
  finally:
    engine.close()


def _make_app(
  engine: engine_vllm.VllmEngine, directory: pathlib.Path
) -> fastapi.FastAPI:
  """Creates a server for the engine, with the limits of scripts/serve.py."""
  digest = manifest.tokenizer_digest(directory)
  weights = weight_channel.Channel(
    role="student", shapes={}, tokenizer_digest=digest, allowed_root=None
  )
  limits = service.Limits(
    max_body_bytes=32 * 2**20,
    max_total_body_bytes=2**28,
    max_text_chars=2**20,
    max_prompts=4096,
    max_n=256,
    max_tokens=32768,
    max_queue=16384,
    hang_s=300.0,
    drain_s=600.0,
    load_s=600.0,
  )
  backend = service.Service(
    engine, weights, role="student", tokenizer_digest=digest, limits=limits
  )
  tokens = admission.Tokens(user=None, admin=None)
  return server_app.create_app(backend, tokens=tokens)


async def _run(
  app: fastapi.FastAPI, bound: socket.socket, engine: engine_vllm.VllmEngine
) -> None:
  serving = asyncio.create_task(listen.serve(app, bound, drain_s=1.0))
  _print_json(port=bound.getsockname()[1])
  while line := await asyncio.to_thread(sys.stdin.readline):
    request = wire.GenerateRequest.model_validate_json(line)
    await engine.reset_prefix_cache()
    start = time.perf_counter()
    num_tokens = await _draw(engine, request)
    _print_json(tokens=num_tokens, seconds=time.perf_counter() - start)
  os.kill(os.getpid(), signal.SIGTERM)  # Stops the server as users do.
  await serving


async def _draw(
  engine: engine_vllm.VllmEngine, request: wire.GenerateRequest
) -> int:
  """Samples all prompts with vLLM at once; returns the number of tokens."""
  params = types.SamplingParams(
    group_size=request.n,
    max_completion_tokens=request.max_tokens,
    temperature=request.temperature,
    top_p=request.top_p,
    top_k=request.top_k,
    seed=request.seed,
  )
  groups = await asyncio.gather(
    *(
      engine.draw(types.Prompt(p.row_id, "", tuple(p.token_ids or ())), params)
      for p in request.prompts
    )
  )
  return sum(len(output.token_ids) for group in groups for output in group)


def _print_json(**values: float) -> None:
  print(json.dumps(values), flush=True)


# vLLM's worker processes import this module too.
if __name__ == "__main__":
  program.run(main)
