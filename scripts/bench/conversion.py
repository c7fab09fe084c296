# SPDX-License-Identifier: Apache-2.0
"""Times loading and exporting against plain reads and writes of the bytes.

  python -m scripts.bench.conversion --width=2048 --layers=16

Files are bfloat16. A plain read goes into new memory, a plain write ends with
fsync; both alternate in one process with our loading and exporting and with
those of transformers. Parameters are bfloat16, or float32 as in training. Files
are in the page cache (warm), or dropped from it before each read (cold). Peak
memory is that of the process, less what it held before and the parameters.
"""

from collections.abc import Callable
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import shutil
import statistics
import tempfile
from typing import Any

from absl import flags
import jax
import numpy as np
import transformers

from atlas_jax import sharding
from atlas_jax.models import decoder, decoder_config
from conversion import card, load, rules, save, shards
from scripts import program
from scripts.bench import memory, timing

_WIDTH = flags.DEFINE_integer(
  "width", 2048, "Width of the model; the MLP is three times as wide."
)
_LAYERS = flags.DEFINE_integer("layers", 16, "Layers of the model.")
_VOCABULARY = flags.DEFINE_integer("vocabulary", 16_384, "Vocabulary size.")
_DTYPES = flags.DEFINE_list(
  "dtypes", ["bfloat16", "float32"], "Precisions of the loaded parameters."
)
_CACHES = flags.DEFINE_list(
  "caches", ["warm", "cold"], "Whether files are in the page cache."
)
_DIRECTORY = flags.DEFINE_string("directory", "/tmp", "Folder for the files.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Repeats of each operation.")
_SHARD_BYTES = flags.DEFINE_integer("shard_bytes", 2**28, "Limit per file.")

_TOUCHED_BYTES = 2**31
_ROW = "| {:>16} | {:>7} | {:>8} | {:>10} | {:>7} | {:>12} | {:>11} |"


@dataclasses.dataclass
class _Measured:
  """Times of every repeat, and the bytes that peak memory grew by."""

  times: timing.Times = dataclasses.field(default_factory=timing.Times)
  grown: list[int] = dataclasses.field(default_factory=list)

  def take(
    self,
    function: Callable[..., Any],  # Any: see `timing.Times.take`.
    *args: Any,
  ) -> Any:
    """Calls a function, and records its time and peak memory."""
    # In a virtual machine, memory is slower when it is touched first.
    np.ones(_TOUCHED_BYTES, np.uint8)
    held = memory.of_process("VmRSS", reset=True)
    result = self.times.take(function, *args)
    self.grown.append(memory.of_process("VmHWM", reset=False) - held)
    return result


def main() -> None:
  """Prints a table and the ratios for each precision and cache state."""
  transformers.utils.logging.disable_progress_bar()
  with tempfile.TemporaryDirectory(dir=_DIRECTORY.value) as directory:
    root = pathlib.Path(directory)
    source, model = _make_model(root)
    for dtype in _DTYPES.value:
      for cache in _CACHES.value:
        times = _measure(root, source, model, dtype, is_cold=cache == "cold")
        print(f"\n{dtype} parameters, {cache} cache")
        _report(model, dtype, times)


def _measure(
  root: pathlib.Path,
  source: pathlib.Path,
  model: decoder.Model,
  dtype: str,
  *,
  is_cold: bool,
) -> dict[str, _Measured]:
  """Measures each operation on one model, `--repeats` times in turn."""
  mesh = sharding.make_mesh(data=1, fsdp=-1, tensor=1)
  places = sharding.of_params(mesh, model.abstract_params)
  times = {name: _Measured() for name in _NAMES}

  def read() -> decoder.Params:
    params = load.load(source, model, param_dtype=dtype, shardings=places)
    return jax.block_until_ready(params)

  def export(params: decoder.Params) -> None:
    _save(root / "export", params, model, root)

  export(read())  # Compiles the programs that fetch the tensors.
  shutil.rmtree(root / "export")
  for _ in range(_REPEATS.value):
    _prepare(source, is_cold=is_cold)
    plain = times["plain read"].take(_read_plainly, source)
    times["digests"].take(_digests, plain)
    times["plain write"].take(_write_plainly, plain, root / "plain")
    (root / "plain").unlink()
    del plain
    _prepare(source, is_cold=is_cold)
    params = times["load"].take(read)
    times["export"].take(export, params)
    del params
    shutil.rmtree(root / "export")
    _prepare(source, is_cold=is_cold)
    peer = times["from_pretrained"].take(_from_pretrained, source, dtype)
    times["save_pretrained"].take(_save_pretrained, peer, root / "peer")
    del peer
    shutil.rmtree(root / "peer")
  return times


def _report(
  model: decoder.Model, dtype: str, measured: dict[str, _Measured]
) -> None:
  """Prints a row for each operation, and the ratios."""
  counts = [math.prod(shape) for shape in rules.shapes(model).values()]
  held, largest = sum(counts) * np.dtype(dtype).itemsize, max(counts)
  moved = sum(counts) * _FILE_ITEMSIZE
  allowed = 2 * largest * np.dtype(dtype).itemsize * load.NUM_READERS
  print(
    f"{os.cpu_count()} cores, {jax.device_count()} {jax.default_backend()} "
    f"devices, n={_REPEATS.value}; {moved / 2**20:.0f} MiB of files; "
    f"{allowed / 2**20:.0f} MiB more than the parameters may be in memory\n"
  )
  header = ("", "best s", "median s", "best MiB/s", "CPU s", "x plain")
  print(_ROW.format(*header, "MiB more"))
  print(_ROW.format(*["---:"] * 7))
  times = {name: each.times for name, each in measured.items()}
  for name, taken in times.items():
    plain = times["plain write" if name in _WRITES else "plain read"]
    best = min(taken.wall)
    more = max(measured[name].grown) - (
      held if name in ("load", "from_pretrained", "plain read") else 0
    )
    print(
      _ROW.format(
        name,
        f"{best:.3f}",
        f"{statistics.median(taken.wall):.3f}",
        f"{moved / best / 2**20:.0f}",
        f"{min(taken.cpu):.3f}",
        _compared([plain.wall], [taken.wall]),
        f"{max(more, 0) / 2**20:.0f}",
      )
    )
  hashed = 2 * min(times["digests"].cpu)
  print(
    f"\nOf an export's {min(times['export'].cpu):.3f} s of CPU time, digests "
    f"in both directions take {hashed:.3f}.\nBest / median:"
  )
  for what, ours, plain, peer in _COMPARED:
    mine, disk, theirs = (
      [times[name].wall for name in names] for names in (ours, plain, peer)
    )
    print(
      f"{what}: {_compared(disk, mine)} of the plain speed; transformers takes "
      f"{_compared(theirs, mine)} times as long"
    )


def _compared(theirs: list[list[float]], ours: list[list[float]]) -> str:
  """Formats the ratio of summed times: of the best, and the median ratio."""
  a, b = (
    [sum(each) for each in zip(*sides, strict=True)] for sides in (theirs, ours)
  )
  ratios = [x / y for x, y in zip(a, b, strict=True)]
  return f"{min(a) / min(b):.2f} / {statistics.median(ratios):.2f}"


_FILE_ITEMSIZE = 2  # bfloat16.
_NAMES = ("plain read", "load", "from_pretrained", "digests")
_WRITES = ("plain write", "export", "save_pretrained")
_NAMES += _WRITES
_COMPARED = (
  ("load", ["load"], ["plain read"], ["from_pretrained"]),
  ("export", ["export"], ["plain write"], ["save_pretrained"]),
  (
    "both",
    ["load", "export"],
    ["plain read", "plain write"],
    ["from_pretrained", "save_pretrained"],
  ),
)


def _read_plainly(directory: pathlib.Path) -> list[np.ndarray]:
  """Reads all weight files, one after the other, into new memory."""
  read = []
  for path in sorted(directory.glob("*.safetensors")):
    read.append(np.empty(path.stat().st_size, np.uint8))
    with path.open("rb", buffering=0) as file:
      file.readinto(read[-1].data)
  return read


def _write_plainly(arrays: list[np.ndarray], path: pathlib.Path) -> None:
  """Writes bytes to a file, and calls fsync."""
  with path.open("wb", buffering=0) as file:
    for array in arrays:
      file.write(array.data)
    os.fsync(file.fileno())


def _digests(arrays: list[np.ndarray]) -> None:
  """Hashes all bytes, as an export does while it writes them."""
  for array in arrays:
    shards.new_digest().update(array.data)


def _from_pretrained(
  directory: pathlib.Path, dtype: str
) -> Any:  # Any: a transformers model.
  """Loads a model with transformers; reads every value of a mapped one."""
  model = transformers.AutoModelForCausalLM.from_pretrained(
    directory, dtype=dtype, trust_remote_code=False
  )
  if dtype == "bfloat16":
    for value in model.parameters():
      value.max()
  return model


def _save_pretrained(
  model: Any,  # Any: a transformers model.
  directory: pathlib.Path,
) -> None:
  """Saves in bfloat16 with transformers, and calls fsync, as the others do."""
  model.bfloat16().save_pretrained(directory, max_shard_size=_SHARD_BYTES.value)
  for path in directory.iterdir():
    with path.open("rb") as file:
      os.fsync(file.fileno())


def _prepare(directory: pathlib.Path, *, is_cold: bool) -> None:
  """Reads all weight files into the page cache, or drops them from it."""
  for path in directory.glob("*.safetensors"):
    with path.open("rb") as file:
      if is_cold:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
      else:
        hashlib.file_digest(file, "md5")


def _make_model(root: pathlib.Path) -> tuple[pathlib.Path, decoder.Model]:
  """Writes a model with random weights in bfloat16."""
  width = _WIDTH.value
  fields = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "dtype": "bfloat16",
    "vocab_size": _VOCABULARY.value,
    "hidden_size": width,
    "intermediate_size": 3 * width,
    "num_hidden_layers": _LAYERS.value,
    "num_attention_heads": max(8, width // 128),
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
  }
  (root / "config.json").write_text(json.dumps(fields), encoding="utf-8")
  (root / "tokenizer.json").write_text("{}", encoding="utf-8")
  config = decoder_config.from_hf(fields)
  model = decoder.build(
    config, dtype="float32", attention="xla", remat="none", unroll=1
  )
  source = root / "model"
  source.mkdir()
  shutil.copyfile(root / "config.json", source / "config.json")
  values = np.random.default_rng(0).normal(0, 0.02, 2**20).astype(np.float32)
  shapes = rules.shapes(model)
  shards.write(
    source,
    shapes,
    lambda name: np.resize(values, shapes[name]),
    dtype="bfloat16",
    max_shard_bytes=_SHARD_BYTES.value,
  )
  return source, model


def _save(
  directory: pathlib.Path,
  params: decoder.Params,
  model: decoder.Model,
  source: pathlib.Path,
) -> None:
  save.save(
    directory,
    params,
    model,
    source=source,
    dtype="bfloat16",
    max_shard_bytes=_SHARD_BYTES.value,
    about=card.Card(base=""),
    overwrite=False,
  )


if __name__ == "__main__":
  program.run(main)
