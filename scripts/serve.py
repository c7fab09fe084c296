# SPDX-License-Identifier: Apache-2.0
"""Serves completions of a model whose weights a trainer can replace.

  .venv-rollout/bin/python -m scripts.serve --engine=vllm --role=policy \
    --model=DIR --port=8765

Without vLLM, use .venv and --engine=jax. The endpoints are documented at
http://127.0.0.1:8765/docs. On SIGTERM, running requests finish and the exit
code is 0.
"""

import asyncio
import importlib
import os
import pathlib

from absl import flags, logging

from atlas_jax import errors
from conversion import shards
from rollout import addresses, manifest, tokens, wire
from rollout.server import app as server_app
from rollout.server import engine, listen, service, weight_channel
from scripts import dtypes, program

_ENGINE = flags.DEFINE_enum(
  "engine", None, ["vllm", "jax"], "Inference engine.", required=True
)
_MODEL = flags.DEFINE_string(
  "model", None, "Model directory in Hugging Face format.", required=True
)
_ROLE = flags.DEFINE_enum(
  "role",
  None,
  ["policy", "student"],
  "Role of the model; a student's weights are never replaced.",
  required=True,
)
_HOST = flags.DEFINE_string(
  "host", "127.0.0.1", "Address to listen on; other hosts need a token."
)
_PORT = flags.DEFINE_integer("port", 8765, "Port to listen on.")
_TOKEN_FILE = flags.DEFINE_string(
  "token_file",
  None,
  f"File with the token; or set {tokens.VARIABLE} or {tokens.FILE_VARIABLE}.",
)
_WEIGHTS_ROOT = flags.DEFINE_string(
  "weights_root", None, "If set, pushed weights must be below this directory."
)
_DTYPE = dtypes.define_flag(
  "dtype",
  "auto",
  ["auto", "float32", "bfloat16"],
  "Dtype of weights and activations; auto uses that of config.json.",
)
_MAX_MODEL_LEN = flags.DEFINE_integer(
  "max_model_len",
  None,
  "Maximum tokens of prompt plus completion; default: the model's maximum.",
)
# Flags of one engine only; the other engine rejects them.
_ENGINE_FLAGS = {
  "vllm": {
    "tensor_parallel_size": flags.DEFINE_integer(
      "tensor_parallel_size", 1, "vllm: number of devices for the weights."
    ),
    "gpu_memory_utilization": flags.DEFINE_float(
      "gpu_memory_utilization", 0.9, "vllm: fraction of GPU memory to use."
    ),
    "kv_cache_gib": flags.DEFINE_float(
      "kv_cache_gib", None, "vllm: KV cache size; default: remaining memory."
    ),
    "enforce_eager": flags.DEFINE_bool(
      "enforce_eager",
      False,
      "vllm: do not compile; starts faster, runs slower.",
    ),
  },
  "jax": {
    "max_rows": flags.DEFINE_integer(
      "max_rows", 256, "jax: maximum completions decoded at once."
    ),
    "ignore_fields": flags.DEFINE_list(
      "ignore_fields", [], "jax: fields of config.json to treat as absent."
    ),
  },
}
_LIMITS = {
  "max_body_bytes": flags.DEFINE_integer(
    "max_body_bytes", 16 * 2**20, "Maximum bytes per request."
  ),
  "max_total_body_bytes": flags.DEFINE_integer(
    "max_total_body_bytes", 2**28, "Maximum bytes of all unfinished bodies."
  ),
  "max_text_chars": flags.DEFINE_integer(
    "max_text_chars", 2**20, "Maximum characters of all texts of a request."
  ),
  "max_prompts": flags.DEFINE_integer(
    "max_prompts", 4096, "Maximum prompts per request."
  ),
  "max_n": flags.DEFINE_integer(
    "max_n", 256, "Maximum completions per prompt."
  ),
  "max_tokens": flags.DEFINE_integer(
    "max_tokens", 32768, "Maximum tokens per completion."
  ),
  "max_queue": flags.DEFINE_integer(
    "max_queue", 16384, "Maximum completions that are queued or running."
  ),
  "hang_s": flags.DEFINE_float(
    "hang_s", 300.0, "Time without progress after which a busy engine is hung."
  ),
  "drain_s": flags.DEFINE_float(
    "drain_s", 600.0, "Wait for running requests before an update or exit."
  ),
  "load_s": flags.DEFINE_float("load_s", 600.0, "Time limit to load weights."),
}


def main() -> None:
  """Serves until SIGTERM or SIGINT."""
  token_file = pathlib.Path(_TOKEN_FILE.value) if _TOKEN_FILE.value else None
  accepted = listen.read_tokens(_HOST.value, token_file, os.environ)
  directory = pathlib.Path(_MODEL.value).expanduser().resolve()
  shards.check_is_model(directory)
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
      app = server_app.create_app(backend, tokens=accepted)
      logging.info(
        "Serving role=%s engine=%s at %s, token=%s.",
        role,
        _ENGINE.value,
        addresses.url(*bound.getsockname()[:2]),
        "required" if accepted.user else "none",
      )
      asyncio.run(listen.serve(app, bound, drain_s=limits.drain_s))
    finally:
      started.close()


def _start_engine(directory: pathlib.Path) -> engine.Engine:
  """Imports the chosen engine, and no other, and starts it."""
  name = _ENGINE.value
  for owner, options in _ENGINE_FLAGS.items():
    for option in options:
      if owner != name and flags.FLAGS[option].present:
        raise errors.ConfigError(
          f"--{option} requires --engine={owner}, got --engine={name}.",
          where=f"--{option}",
          why=f"The {name} engine has no such setting.",
          fix=f"Remove --{option}, or use --engine={owner}.",
        )
  dtype = _DTYPE.value
  if dtype == "auto":
    fields = shards.read_json(directory / "config.json")
    dtype = fields.get("dtype") or fields.get("torch_dtype")
  if dtype not in ("float32", "bfloat16"):
    raise errors.ConfigError(
      f"dtype must be float32 or bfloat16, got {dtype}.",
      where=f"--dtype={_DTYPE.value}, {directory / 'config.json'}",
      why="The trainer supports float32 and bfloat16 only.",
      fix="Set --dtype=bfloat16 or --dtype=float32.",
    )
  # By default vLLM sends usage statistics and looks models up on the Hub.
  os.environ.setdefault("HF_HUB_OFFLINE", "1")
  os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
  os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
  kind = {"vllm": "VllmEngine", "jax": "JaxEngine"}[name]
  try:
    module = importlib.import_module(f"rollout.server.engine_{name}")
  except ImportError as error:
    raise errors.ConfigError(
      f"The {name} engine is not installed in this environment.",
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
