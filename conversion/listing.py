# SPDX-License-Identifier: Apache-2.0
"""Lists the contents of a model directory or a checkpoint from its headers."""

from collections.abc import Iterator, Mapping
import dataclasses
import math
import pathlib

import numpy as np

from atlas_jax import errors
from atlas_jax.models import decoder_config
from conversion import load, orbax_step, shards


@dataclasses.dataclass(frozen=True)
class Header:
  """Dtype, shape and sharding (`place`, as text) of an array."""

  dtype: np.dtype
  shape: tuple[int, ...]
  place: str = ""

  @property
  def num_bytes(self) -> int:
    """Size of the array in bytes."""
    return math.prod(self.shape) * self.dtype.itemsize


def lines(directory: pathlib.Path) -> Iterator[str]:
  """Yields the lines of a listing: config, tree of arrays, total.

  A config of an unsupported model is described by what is unsupported.

  Args:
    directory: in Hugging Face format, or any path that `orbax_step.find`
      accepts.

  Raises:
    errors.CheckpointError: if it is neither, or malformed.
  """
  step = orbax_step.find(directory)
  if step is not None:
    yield f"Orbax checkpoint {step}"
    headers, separator = _of_step(step), "/"
  else:
    yield f"Hugging Face directory {directory}"
    tensors = shards.open_directory(directory)
    headers = {n: Header(t.dtype, t.shape) for n, t in tensors.items()}
    separator = "."
  place = step or directory
  if (place / "config.json").exists():
    yield from _config(place)
  yield from _tree(headers, separator)
  total = sum(header.num_bytes for header in headers.values())
  yield f"{total:>16,}  bytes in {len(headers)} tensors"


def _of_step(step: pathlib.Path) -> dict[str, Header]:
  return {
    path: Header(np.dtype(leaf.dtype), tuple(leaf.shape), _place(leaf.sharding))
    for path, leaf in orbax_step.headers(step).items()
  }


def _place(sharding: object) -> str:
  """Describes how the axes of an array are split over those of a mesh."""
  sizes = dict(
    zip(
      getattr(sharding, "axis_names", ()),
      np.ravel(getattr(sharding, "shape", ())),
      strict=True,
    )
  )
  split = []
  for axes in getattr(sharding, "partition_spec", None) or ():
    names = np.ravel(axes) if axes else ()
    used = [f"{name}={sizes[name]}" for name in names if sizes[name] > 1]
    split.append(" x ".join(used) or "whole")
  return f"  split ({', '.join(split)})" if {*split} - {"whole"} else ""


def _config(place: pathlib.Path) -> Iterator[str]:
  """Yields the config in one line, and the fields that are not computed."""
  try:
    config, fields = load.read_config(place)
  except errors.CheckpointError as error:
    yield f"config.json: {error.what} {error.why}"
    return
  parts = {
    "layers": config.num_layers,
    "width": config.width,
    "heads": f"{config.num_heads} over {config.num_kv_heads} "
    f"of {config.head_width}",
    "MLP": config.mlp_width,
    "vocabulary": config.vocab_size,
    "head": "tied" if config.tie_embeddings else "separate",
  }
  if config.experts:
    parts["experts"] = (
      f"{config.experts.num_chosen} of {config.experts.count}, "
      f"{config.experts.width} wide"
    )
  text = ", ".join(f"{name} {value}" for name, value in parts.items())
  yield f"{config.family}: {text}"
  if unread := decoder_config.unread(fields):
    yield f"Fields that transformers does not read: {', '.join(unread)}"


def _tree(headers: Mapping[str, Header], separator: str) -> Iterator[str]:
  """Yields names indented as a tree; each prefix once, with its total bytes."""
  sizes: dict[tuple[str, ...], int] = {}
  keys = {
    name: tuple(
      int(key) if key.isdecimal() else key for key in name.split(separator)
    )
    for name in headers
  }
  for name, header in headers.items():
    for depth in range(1, len(keys[name])):
      prefix = tuple(map(str, keys[name][:depth]))
      sizes[prefix] = sizes.get(prefix, 0) + header.num_bytes
  shown: set[tuple[str, ...]] = set()
  # Numbers sort by value (layer 10 after layer 9) and before names.
  for name in sorted(
    headers, key=lambda n: [(isinstance(k, str), k) for k in keys[n]]
  ):
    path = tuple(map(str, keys[name]))
    for depth in range(1, len(path)):
      if path[:depth] not in shown:
        shown.add(path[:depth])
        key = "  " * (depth - 1) + path[depth - 1]
        yield f"{sizes[path[:depth]]:>16,}  {key}"
    header = headers[name]
    key = "  " * (len(path) - 1) + path[-1]
    kind = f"{header.dtype.name} {header.shape}{header.place}"
    yield f"{header.num_bytes:>16,}  {key}  {kind}"
