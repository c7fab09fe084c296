# SPDX-License-Identifier: Apache-2.0
"""Times sampling from a rollout server against vLLM called in its process.

  python -m scripts.bench.rollout --prompts=64 --group_size=4

One vLLM engine in .venv-rollout serves both, with random weights and the same
prompts, lengths and seeds. The two alternate, in an order that changes with
each pair of measurements, and the ratio is taken within pairs.
"""

from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
import subprocess
import tempfile
import time

from absl import flags
import jax
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
import transformers

from atlas_jax import errors, types
from atlas_jax.models import decoder, decoder_config
from conversion import card, save
from rollout import manifest, wire
from rollout.remote import client, fleet, http_sampler
from scripts import program

_PROMPTS = flags.DEFINE_integer("prompts", 64, "Prompts in one call.")
_PROMPT_TOKENS = flags.DEFINE_integer(
  "prompt_tokens", 128, "Tokens of each prompt."
)
_GROUP_SIZE = flags.DEFINE_integer("group_size", 4, "Completions of a prompt.")
_MAX_TOKENS = flags.DEFINE_integer(
  "max_tokens", 64, "Limit on tokens of a completion."
)
_PAIRS = flags.DEFINE_integer("pairs", 9, "Pairs of measurements.")
_WIDTH = flags.DEFINE_integer(
  "width", 256, "Width of the model; the MLP is three times as wide."
)
_LAYERS = flags.DEFINE_integer("layers", 4, "Layers of the model.")
_EAGER = flags.DEFINE_bool("eager", True, "Whether vLLM runs uncompiled.")
_MAX_ROWS = 256  # As in the recipes.
_WAYS = ("in process", "HttpSampler")
_ROOT = pathlib.Path(__file__).resolve().parents[2]
_PYTHON = _ROOT / ".venv-rollout/bin/python"


def main() -> None:
  """Prints a table, and the ratio of the two as the last line."""
  if not _PYTHON.exists():
    raise errors.ConfigError(
      "vLLM is not installed.",
      where=str(_PYTHON),
      why="The benchmark runs vLLM in the rollout environment.",
      fix="Run bash scripts/install_rollout.sh.",
    )
  with tempfile.TemporaryDirectory() as name:
    directory = pathlib.Path(name) / "model"
    _write_model(directory)
    with _engine(directory) as process:
      port = _read(process)["port"]
      speeds = _measure(process, f"http://127.0.0.1:{port}", directory)
  _report(speeds)


def _measure(
  process: subprocess.Popen[str], url: str, directory: pathlib.Path
) -> np.ndarray:
  """Returns tokens per second [pairs, 2], with columns as in `_WAYS`."""
  channel = fleet.ChannelTerms(
    role="student",
    tensors={},
    tokenizer_digest=manifest.tokenizer_digest(directory),
    weights_root="",
    heartbeat_s=30.0,
    wait_s=60.0,
  )
  speeds = []
  with http_sampler.HttpSampler(
    [url],
    channel=channel,
    deadlines=client.Deadlines(generate_s=600.0, update_s=60.0, control_s=30.0),
    token=None,
    publish=None,
    max_rows=_MAX_ROWS,
  ) as sampler:
    ways = (
      lambda request: _call_engine(process, request),
      lambda request: _call_sampler(sampler, request),
    )
    for pair in range(-1, _PAIRS.value):  # The first warms up.
      request = _request(seed=pair)
      order = (0, 1) if pair % 2 else (1, 0)
      measured = {way: ways[way](request) for way in order}
      speeds.append([measured[0], measured[1]])
  return np.asarray(speeds[1:])


def _request(seed: int) -> wire.GenerateRequest:
  """Draws new prompts for each pair, so that none is in the prefix cache."""
  rng = np.random.default_rng(seed + 1)
  drawn = rng.integers(3, 256, size=(_PROMPTS.value, _PROMPT_TOKENS.value))
  return wire.GenerateRequest(
    request_id=f"bench-{seed}",
    prompts=[
      wire.PromptIn(row_id=f"row{i}", token_ids=row)
      for i, row in enumerate(drawn.tolist())
    ],
    n=_GROUP_SIZE.value,
    max_tokens=_MAX_TOKENS.value,
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    seed=seed + 1,
  )


def _call_engine(
  process: subprocess.Popen[str], request: wire.GenerateRequest
) -> float:
  """Returns tokens per second of vLLM, as measured in the engine's process."""
  if process.stdin is None:
    raise RuntimeError("The engine was started without a pipe.")
  process.stdin.write(request.model_dump_json() + "\n")
  process.stdin.flush()
  reply = _read(process)
  return reply["tokens"] / reply["seconds"]


def _call_sampler(
  sampler: http_sampler.HttpSampler, request: wire.GenerateRequest
) -> float:
  """Returns tokens per second of the server, sampled as in training."""
  prompts = [
    types.Prompt(p.row_id, "", tuple(p.token_ids or ()))
    for p in request.prompts
  ]
  params = types.SamplingParams(
    group_size=request.n,
    max_completion_tokens=request.max_tokens,
    temperature=request.temperature,
    top_p=request.top_p,
    top_k=request.top_k,
    seed=request.seed,
  )
  start = time.perf_counter()
  groups = sampler.sample(prompts, params)
  seconds = time.perf_counter() - start
  return sum(len(c.token_ids) for group in groups for c in group) / seconds


def _report(speeds: np.ndarray) -> None:
  """Prints medians with 95% bootstrap intervals over pairs."""
  print(
    f"{_PROMPTS.value} prompts of {_PROMPT_TOKENS.value} tokens x "
    f"{_GROUP_SIZE.value}, at most {_MAX_TOKENS.value} new; {len(speeds)} "
    f"pairs; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
  )
  print(f"{'tokens/s':>12} {'median':>8}   95% interval")
  for name, column in zip(_WAYS, speeds.T, strict=True):
    low, median, high = _interval(column)
    print(f"{name:>12} {median:8.0f}   {low:.0f} to {high:.0f}")
  low, median, high = _interval(speeds[:, 1] / speeds[:, 0])
  print(f"{'within pairs':>12} {median:8.3f}   {low:.3f} to {high:.3f}")
  print(f"ratio: {median:.3f}")


def _interval(values: np.ndarray) -> tuple[float, float, float]:
  rng = np.random.default_rng(0)
  drawn = rng.choice(values, size=(10_000, len(values)))
  low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
  return float(low), float(np.median(values)), float(high)


@contextlib.contextmanager
def _engine(directory: pathlib.Path) -> Iterator[subprocess.Popen[str]]:
  """Starts the engine, which exits when its stdin closes or we are killed."""
  env = {
    name: value
    for name, value in os.environ.items()
    if name not in ("XLA_FLAGS", "JAX_PLATFORMS")
  }
  env |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
  env |= {"VLLM_LOGGING_LEVEL": "WARNING"}
  with subprocess.Popen(
    [
      str(_PYTHON),
      "-m",
      "scripts.bench.rollout_engine",
      f"--directory={directory}",
      f"--eager={_EAGER.value}",
    ],
    cwd=_ROOT,
    env=env,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    yield process
    process.communicate()  # Closes stdin, and waits for the exit.


def _read(process: subprocess.Popen[str]) -> dict[str, float]:
  """Reads the next JSON line, and skips lines that vLLM prints."""
  if process.stdout is None:
    raise RuntimeError("The engine was started without a pipe.")
  for line in process.stdout:
    if line.startswith("{"):
      return json.loads(line)
  raise errors.RolloutError(
    "The engine exited.",
    where="scripts/bench/rollout_engine.py",
    why=f"Its exit code is {process.wait()}.",
    fix="See its messages above.",
  )


def _write_model(directory: pathlib.Path) -> None:
  """Writes a model with random weights, and a byte-level tokenizer."""
  source = directory.with_name("source")
  special = ("<pad>", "<start>", "<end>")
  tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
  core = tokenizers.Tokenizer(
    models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
  )
  core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  core.decoder = decoders.ByteLevel()
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=core,
    pad_token=special[0],
    eos_token=special[2],
    chat_template="{{ messages }}",
  ).save_pretrained(source)
  fields = {
    "model_type": "qwen3",
    "vocab_size": 4096,
    "hidden_size": _WIDTH.value,
    "intermediate_size": 3 * _WIDTH.value,
    "num_hidden_layers": _LAYERS.value,
    "num_attention_heads": _WIDTH.value // 64,
    "num_key_value_heads": max(1, _WIDTH.value // 128),
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "pad_token_id": 0,
  }
  (source / "config.json").write_text(json.dumps(fields), encoding="utf-8")
  model = decoder.build(
    decoder_config.from_hf(fields),
    dtype="float32",
    attention="xla",
    remat="none",
    unroll=1,
  )
  save.save(
    directory,
    model.init(jax.random.key(0)),
    model,
    source=source,
    dtype="float32",
    max_shard_bytes=10**9,
    about=card.Card(base="test"),
    overwrite=False,
  )


if __name__ == "__main__":
  program.run(main)
