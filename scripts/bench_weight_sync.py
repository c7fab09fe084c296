# SPDX-License-Identifier: Apache-2.0
"""Times the hand-off of weights against a plain copy of the same bytes.

  python -m scripts.bench_weight_sync --width=1024 --layers=8 --dtype=bfloat16

Publishing, and the check of every byte that a server makes, count as the
hand-off. The three alternate in one process, and the best of each is taken.
"""

from collections.abc import Callable
import json
import os
import pathlib
import shutil
import tempfile
import time
from typing import Any

from absl import flags
import jax

from atlas_jax.models import config as model_config
from atlas_jax.models import decoder
from conversion import rules
from rollout import manifest, weight_sync
from scripts import program

_WIDTH = flags.DEFINE_integer("width", 1024, "Of the model; the MLP's is 3x.")
_LAYERS = flags.DEFINE_integer("layers", 8, "How many.")
_VOCABULARY = flags.DEFINE_integer("vocabulary", 32_000, "Its size.")
_DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", ["bfloat16", "float32"], "Of what is written."
)
_DIRECTORY = flags.DEFINE_string("directory", "/dev/shm", "Where to.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "How often.")
_SHARD_BYTES = flags.DEFINE_integer("shard_bytes", 2**27, "Of one file.")


def main() -> None:
  """Prints one line per measurement."""
  with tempfile.TemporaryDirectory(dir=_DIRECTORY.value) as directory:
    root = pathlib.Path(directory)
    model, params = _make_model(root)
    shapes = rules.shapes(model)
    times: dict[str, list[float]] = {}

    def publish(version: int) -> weight_sync.Published:
      return weight_sync.publish(
        params,
        model,
        root,
        version,
        source=root,
        dtype=_DTYPE.value,
        max_shard_bytes=_SHARD_BYTES.value,
      )

    def verify(published: weight_sync.Published) -> pathlib.Path:
      return manifest.verify(
        root,
        version=published.version,
        digest=published.digest,
        shapes=shapes,
      )

    for version in range(_REPEATS.value):
      held = _memory("VmRSS", reset=True)
      published = _timed(times, "publish", publish, version)
      grown = _memory("VmHWM", reset=False) - held
      _timed(times, "verify", verify, published)
      _timed(times, "copy", _copy, published.path, root / "copy")
      shutil.rmtree(root / "copy")
      weight_sync.prune(root, keep=1)
  print(
    f"{published.num_bytes / 2**20:.0f} MiB to {_DIRECTORY.value}, "
    f"{os.cpu_count()} cores, {jax.default_backend()}"
  )
  best = {name: min(seconds) for name, seconds in times.items()}
  best["hand-off"] = best["publish"] + best["verify"]
  for name, seconds in best.items():
    speed = published.num_bytes / seconds / 2**20
    print(f"{name:>10} {seconds:8.3f} s {speed:8.0f} MiB/s")
  print(f"hand-off against copy: {best['copy'] / best['hand-off']:.2f}")
  print(f"host memory grew by at most {grown / 2**20:.0f} MiB")


def _make_model(
  directory: pathlib.Path,
) -> tuple[decoder.Model, decoder.Params]:
  """Draws float32 parameters, and writes the config that describes them."""
  fields = {
    "model_type": "qwen3",
    "vocab_size": _VOCABULARY.value,
    "hidden_size": _WIDTH.value,
    "intermediate_size": 3 * _WIDTH.value,
    "num_hidden_layers": _LAYERS.value,
    "num_attention_heads": max(1, _WIDTH.value // 64),
    "num_key_value_heads": max(1, _WIDTH.value // 256),
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
  }
  (directory / "config.json").write_text(json.dumps(fields), encoding="utf-8")
  config = model_config.from_hf(fields)
  model = decoder.build(config, dtype="float32", remat="none", unroll=1)
  params = jax.tree.map(
    lambda leaf: jax.random.normal(jax.random.key(0), leaf.shape),
    model.abstract_params,
  )
  return model, jax.block_until_ready(params)


def _copy(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies a directory and waits until it is on disk, as publishing does."""
  shutil.copytree(source, target)
  for path in target.iterdir():
    with path.open("rb") as file:
      os.fsync(file.fileno())


def _timed(
  times: dict[str, list[float]],
  name: str,
  function: Callable[..., Any],  # Any: what it takes and gives is its own.
  *args: Any,
) -> Any:
  start = time.perf_counter()
  result = function(*args)
  times.setdefault(name, []).append(time.perf_counter() - start)
  return result


def _memory(field: str, *, reset: bool) -> int:
  """Reads this process's memory in bytes; `reset` forgets its peak."""
  if reset:
    pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
  status = pathlib.Path("/proc/self/status").read_text(encoding="ascii")
  (line,) = (x for x in status.splitlines() if x.startswith(field + ":"))
  return int(line.split()[1]) * 1024


if __name__ == "__main__":
  program.run(main)
