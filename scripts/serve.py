# SPDX-License-Identifier: Apache-2.0
"""Serves completions of a model whose weights a trainer may replace.

  .venv-rollout/bin/python -m scripts.serve --engine=vllm --role=policy \
    --model=DIR --port=8765

Without vLLM, .venv and --engine=jax do the same. Every endpoint is described at
http://127.0.0.1:8765/docs. SIGTERM lets running requests end, then exits 0.
"""

import asyncio
import importlib
import os
import pathlib

from absl import flags, logging

from atlas_jax import errors
from conversion import shards
from rollout import manifest, wire
from rollout.server import app as server_app
from rollout.server import engine, listen, service, weight_channel
from scripts import program

_ENGINE = flags.DEFINE_enum(
  "engine", None, ["vllm", "jax"], "What samples.", required=True
)
_MODEL = flags.DEFINE_string(
  "model", None, "A Hugging Face directory.", required=True
)
_ROLE = flags.DEFINE_enum(
  "role",
  None,
  ["policy", "student"],
  "A student's weights never change.",
  required=True,
)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Any other needs a token.")
_PORT = flags.DEFINE_integer("port", 8765, "Where it listens.")
_TOKEN_FILE = flags.DEFINE_string(
  "token_file", None, f"Holds the token; or set {listen.TOKEN_VARIABLE}."
)
_WEIGHTS_ROOT = flags.DEFINE_string(
  "weights_root", None, "If set, pushed weights must lie below it."
)
_DTYPE = flags.DEFINE_enum(
  "dtype",
  "auto",
  ["auto", "float32", "bfloat16"],
  "Of weights and activations; auto is what config.json says.",
)
_MAX_MODEL_LEN = flags.DEFINE_integer(
  "max_model_len", None, "Of prompt and completion; the model's if unset."
)
# Of one engine each: anything else would be ignored, so it is refused.
_ENGINE_FLAGS = {
  "vllm": {
    "tensor_parallel_size": flags.DEFINE_integer(
      "tensor_parallel_size", 1, "vllm: devices that share the weights."
    ),
    "gpu_memory_utilization": flags.DEFINE_float(
      "gpu_memory_utilization", 0.9, "vllm: fraction of memory taken."
    ),
    "kv_cache_gib": flags.DEFINE_float(
      "kv_cache_gib", None, "vllm: size of the cache; else what is left."
    ),
    "enforce_eager": flags.DEFINE_bool(
      "enforce_eager", False, "vllm: start sooner, run slower."
    ),
  },
  "jax": {
    "max_rows": flags.DEFINE_integer(
      "max_rows", 256, "jax: completions decoded at once."
    ),
  },
}
_LIMITS = {
  "max_body_bytes": flags.DEFINE_integer(
    "max_body_bytes", 32 * 2**20, "Bytes of one request."
  ),
  "max_prompts": flags.DEFINE_integer(
    "max_prompts", 4096, "Prompts of one request."
  ),
  "max_n": flags.DEFINE_integer("max_n", 256, "Completions of one prompt."),
  "max_tokens": flags.DEFINE_integer(
    "max_tokens", 32768, "Tokens of one completion."
  ),
  "max_queue": flags.DEFINE_integer(
    "max_queue", 16384, "Completions of all requests that are not done yet."
  ),
  "hang_s": flags.DEFINE_float(
    "hang_s", 300.0, "Busy without progress for so long, an engine is hung."
  ),
  "drain_s": flags.DEFINE_float(
    "drain_s", 600.0, "What runs may take before an update, or the end."
  ),
  "load_s": flags.DEFINE_float("load_s", 600.0, "What loading may take."),
}


def main() -> None:
  """Serves until it is told to stop."""
  token_file = pathlib.Path(_TOKEN_FILE.value) if _TOKEN_FILE.value else None
  tokens = listen.read_tokens(_HOST.value, token_file)
  directory = pathlib.Path(_MODEL.value).expanduser().resolve()
  weights_root = _WEIGHTS_ROOT.value
  role: wire.Role = "policy" if _ROLE.value == "policy" else "student"
  limits = service.Limits(**{k: flag.value for k, flag in _LIMITS.items()})
  with listen.bind(_HOST.value, _PORT.value) as bound, listen.stoppable():
    tokenizer_digest = manifest.tokenizer_digest(directory)
    weights = weight_channel.Channel(
      role=role,
      shapes=manifest.shapes_of(directory),
      tokenizer_digest=tokenizer_digest,
      allowed_root=pathlib.Path(weights_root) if weights_root else None,
    )
    started = _start_engine(directory)
    try:
      backend = service.Service(
        started,
        weights,
        role=role,
        tokenizer_digest=tokenizer_digest,
        limits=limits,
      )
      app = server_app.create_app(backend, tokens=tokens)
      logging.info(
        "The %s is served at http://%s:%d by %s.",
        *(role, *bound.getsockname()[:2], _ENGINE.value),
      )
      asyncio.run(listen.serve(app, bound, drain_s=limits.drain_s))
    finally:
      started.close()


def _start_engine(directory: pathlib.Path) -> engine.Engine:
  """Imports the engine that is asked for, and no other, and starts it."""
  name = _ENGINE.value
  for owner, options in _ENGINE_FLAGS.items():
    for option in options:
      if owner != name and flags.FLAGS[option].present:
        raise errors.ConfigError(
          f"--{option} means nothing to this engine.",
          where=f"--engine={name}",
          why=f"It is a setting of --engine={owner}.",
          fix=f"Leave it out, or use --engine={owner}.",
        )
  dtype = _DTYPE.value
  if dtype == "auto":
    fields = shards.read_json(directory / "config.json")
    dtype = fields.get("dtype") or fields.get("torch_dtype")
  if dtype not in ("float32", "bfloat16"):
    raise errors.ConfigError(
      f"Weights cannot be served as {dtype}.",
      where=f"--dtype={_DTYPE.value}, {directory / 'config.json'}",
      why="Trainer and server agree in float32 and bfloat16 only.",
      fix="Set --dtype=bfloat16 or --dtype=float32.",
    )
  # vLLM calls home and looks models up on the hub unless it is told not to.
  os.environ.setdefault("HF_HUB_OFFLINE", "1")
  os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
  os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
  kind = {"vllm": "VllmEngine", "jax": "JaxEngine"}[name]
  try:
    module = importlib.import_module(f"rollout.server.engine_{name}")
  except ImportError as error:
    raise errors.ConfigError(
      f"The {name} engine is not installed here.",
      where=f"--engine={name}",
      why=str(error),
      fix="For vllm: bash scripts/install_rollout.sh, then "
      ".venv-rollout/bin/python. For jax: use .venv/bin/python.",
    ) from error
  options = {k: flag.value for k, flag in _ENGINE_FLAGS[name].items()}
  return getattr(module, kind)(
    directory, dtype=dtype, max_model_len=_MAX_MODEL_LEN.value, **options
  )


if __name__ == "__main__":
  program.run(main)
