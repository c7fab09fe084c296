# SPDX-License-Identifier: Apache-2.0
"""Times a weight update of a server against a plain copy of the same bytes.

  python -m scripts.bench.weight_sync --width=1024 --layers=8 --dtype=bfloat16

The hand-off is publishing plus the server's check of every byte; a push is the
hand-off plus loading by the JAX engine. They alternate with the copy in one
process. Printed are the ratio of the best times and the median ratio of all
repeats. CPU seconds are of all threads, and vary less than wall-clock time when
the machine is shared.
"""

import json
import math
import os
import pathlib
import shutil
import statistics
import tempfile

from absl import flags
import jax
import numpy as np

from atlas_jax.models import decoder, decoder_config
from conversion import load, rules
from rollout import manifest
from rollout.remote import push
from scripts import program
from scripts.bench import memory, timing

_WIDTH = flags.DEFINE_integer(
  "width", 1024, "Width of the model; the MLP is three times as wide."
)
_LAYERS = flags.DEFINE_integer("layers", 8, "Layers of the model.")
_VOCABULARY = flags.DEFINE_integer("vocabulary", 32_000, "Vocabulary size.")
_DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", ["bfloat16", "float32"], "Precision of the files."
)
_DIRECTORY = flags.DEFINE_string(
  "directory", "/dev/shm", "Folder for the files."
)
_REPEATS = flags.DEFINE_integer("repeats", 10, "Repeats of each operation.")
_SHARD_BYTES = flags.DEFINE_integer("shard_bytes", 2**26, "Limit per file.")

_TINY = {"width": 64, "layers": 2, "vocabulary": 512}
_ROW = "| {:>8} | {:>7} | {:>11} | {:>13} | {:>9} | {:>12} |"


def main() -> None:
  """Prints a table for a tiny model, and one for the model of the flags."""
  print(f"{os.cpu_count()} cores, {jax.default_backend()}, {_DTYPE.value}")
  for sizes in (
    _TINY,
    {
      "width": _WIDTH.value,
      "layers": _LAYERS.value,
      "vocabulary": _VOCABULARY.value,
    },
  ):
    with tempfile.TemporaryDirectory(dir=_DIRECTORY.value) as directory:
      _measure(pathlib.Path(directory), **sizes)


def _measure(root: pathlib.Path, **sizes: int) -> None:
  """Measures each operation on one model, `--repeats` times in turn."""
  model, params = _make_model(root, **sizes)
  shapes = rules.shapes(model)
  dtype = "float32" if _DTYPE.value == "float32" else "bfloat16"
  publishing, checking, copying, loading = (timing.Times() for _ in range(4))
  grown: list[int] = []

  def publish(version: int) -> push.Published:
    return push.publish(
      params,
      model,
      root,
      version,
      source=root,
      dtype=dtype,
      max_shard_bytes=_SHARD_BYTES.value,
    )

  def verify(published: push.Published) -> pathlib.Path:
    return manifest.verify(
      root, version=published.version, digest=published.digest, shapes=shapes
    )

  def read(published: push.Published) -> decoder.Params:
    params = load.load(published.path, model, param_dtype=dtype)
    return jax.block_until_ready(params)

  num_bytes = publish(0).num_bytes  # Compiles programs that fetch the tensors.
  for version in range(1, _REPEATS.value + 1):
    held = memory.of_process("VmRSS", reset=True)
    published = publishing.take(publish, version)
    grown.append(memory.of_process("VmHWM", reset=False) - held)
    checking.take(verify, published)
    copying.take(_copy, published.path, root / "copy")
    shutil.rmtree(root / "copy")
    loading.take(read, published)
    push.prune(root, keep=1)

  largest = max(map(math.prod, shapes.values())) * np.dtype(dtype).itemsize
  print(
    f"\n{num_bytes / 2**20:.1f} MiB to {_DIRECTORY.value}, n={_REPEATS.value}; "
    f"the largest tensor is {largest / 2**20:.1f} MiB, and "
    f"publishing grew peak memory by at most {max(grown) / 2**20:.1f} MiB\n"
  )
  rows = {
    "copy": copying,
    "publish": publishing,
    "verify": checking,
    "hand-off": publishing + checking,
    "load": loading,
    "push": publishing + checking + loading,
  }
  _print_table(num_bytes, rows)


def _print_table(num_bytes: int, rows: dict[str, timing.Times]) -> None:
  """Prints a row for each operation, and its ratio to `copy`."""
  print(_ROW.format("", "best s", "median s", "best MiB/s", "CPU s", "x copy"))
  print(_ROW.format(*["---:"] * 6))
  copied = rows["copy"].wall
  for name, times in rows.items():
    best = min(times.wall)
    ratios = [x / y for x, y in zip(copied, times.wall, strict=True)]
    print(
      _ROW.format(
        name,
        f"{best:.4f}",
        f"{statistics.median(times.wall):.4f}",
        f"{num_bytes / best / 2**20:.0f}",
        f"{min(times.cpu):.4f}",
        f"{min(copied) / best:.2f} / {statistics.median(ratios):.2f}",
      )
    )


def _make_model(
  directory: pathlib.Path, *, width: int, layers: int, vocabulary: int
) -> tuple[decoder.Model, decoder.Params]:
  """Draws random float32 parameters, and writes their config.json."""
  fields = {
    "model_type": "qwen3",
    "vocab_size": vocabulary,
    "hidden_size": width,
    "intermediate_size": 3 * width,
    "num_hidden_layers": layers,
    "num_attention_heads": max(1, width // 64),
    "num_key_value_heads": max(1, width // 256),
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
  }
  (directory / "config.json").write_text(json.dumps(fields), encoding="utf-8")
  config = decoder_config.from_hf(fields)
  model = decoder.build(
    config, dtype="float32", attention="xla", remat="none", unroll=1
  )
  params = jax.tree.map(
    lambda leaf: jax.random.normal(jax.random.key(0), leaf.shape),
    model.abstract_params,
  )
  return model, jax.block_until_ready(params)


def _copy(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies a directory and calls fsync, as publishing does."""
  shutil.copytree(source, target)
  for path in target.iterdir():
    with path.open("rb") as file:
      os.fsync(file.fileno())


if __name__ == "__main__":
  program.run(main)
