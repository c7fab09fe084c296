# SPDX-License-Identifier: Apache-2.0
"""Reads and writes the headers of `*.safetensors` files.

A file consists of eight bytes of header length, a JSON header and the tensors'
bytes. Files are untrusted: every claim of the header is checked against the
file before any tensor is read.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import math
import os
import pathlib
import re
import reprlib
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from atlas_jax import errors

_DTYPES = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LENGTH_BYTES = 8
# The largest public checkpoints stay below a tenth of each of these.
MAX_TENSORS = 100_000
_MAX_BYTES = 16 * 2**20
_NAME = re.compile(r"[\w.-]{1,256}", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Position of one tensor's bytes in a file: `begin` to `end`."""

  file: pathlib.Path
  dtype: np.dtype
  shape: tuple[int, ...]
  begin: int
  end: int


def read(path: pathlib.Path) -> dict[str, Tensor]:
  """Reads and checks the header of one file.

  Raises:
    errors.CheckpointError: unless the tensors tile the body of the file
      exactly, each with a supported dtype and the size that its shape needs.
  """
  try:
    with path.open("rb") as file:
      file_size = os.fstat(file.fileno()).st_size
      length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
      start = _LENGTH_BYTES + length
      if length > _MAX_BYTES or start > file_size:
        raise malformed(
          path, f"its header claims {length} bytes in a file of {file_size}"
        )
      header = json.loads(file.read(length), object_pairs_hook=_unique)
  except (OSError, ValueError, RecursionError) as error:
    raise malformed(path, f"its header cannot be read ({error})") from error
  if not isinstance(header, dict) or len(header) > MAX_TENSORS:
    raise malformed(
      path, f"its header must be an object of at most {MAX_TENSORS} keys"
    )
  header.pop("__metadata__", None)
  tensors = {
    name: _entry(path, name, entry, start) for name, entry in header.items()
  }
  _check_tiling(path, tensors, start, file_size)
  return tensors


def make(shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype) -> bytes:
  """Returns the bytes before the tensors: the header and its length."""
  # transformers rejects files without a framework in the metadata.
  entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # Any: JSON.
  position = 0
  for name, shape in shapes.items():
    end = position + math.prod(shape) * dtype.itemsize
    entries[name] = {
      "dtype": _DTYPE_NAMES[dtype],
      "shape": list(shape),
      "data_offsets": [position, end],
    }
    position = end
  raw = json.dumps(entries).encode()
  raw += b" " * (-len(raw) % _LENGTH_BYTES)  # Keeps the tensors aligned.
  return len(raw).to_bytes(_LENGTH_BYTES, "little") + raw


def malformed(
  path: pathlib.Path, why: str, fix: str = "Download or export the model again."
) -> errors.CheckpointError:
  """Returns the error for a malformed file."""
  return errors.CheckpointError(
    f"{path.name} is malformed.", where=str(path), why=f"{why}.", fix=fix
  )


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:  # Any: JSON.
  fields = dict(pairs)
  if len(fields) != len(pairs):
    raise ValueError("duplicate key")
  return fields


def _entry(
  path: pathlib.Path,
  name: str,
  entry: Any,  # Any: untrusted JSON.
  start: int,
) -> Tensor:
  """Parses one tensor's entry; the body of the file begins at `start`."""
  if not isinstance(entry, dict):
    raise malformed(path, f"the entry of {reprlib.repr(name)} is not an object")
  kind, short = entry.get("dtype"), reprlib.repr(name)
  if not _NAME.fullmatch(name):
    raise malformed(path, f"{short} is not a valid tensor name")
  if not isinstance(kind, str) or kind not in _DTYPES:
    raise malformed(
      path,
      f"{short} has dtype {reprlib.repr(kind)}; "
      f"supported are {sorted(_DTYPES)}",
      fix="Convert the weights to bfloat16 or float32 first.",
    )
  shape, offsets = entry.get("shape"), entry.get("data_offsets")
  if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
    given = f"shape {reprlib.repr(shape)}, offsets {reprlib.repr(offsets)}"
    raise malformed(path, f"{short} has {given}")
  dtype, (begin, end) = _DTYPES[kind], offsets
  if math.prod(shape) * dtype.itemsize != end - begin:
    raise malformed(
      path, f"{short} of shape {shape} does not fit {end - begin} bytes"
    )
  return Tensor(path, dtype, tuple(shape), start + begin, start + end)


def _are_sizes(
  value: Any,  # Any: untrusted JSON.
) -> TypeGuard[list[int]]:
  return (
    isinstance(value, list)
    and len(value) <= 8
    and all(type(size) is int and 0 <= size < 2**63 for size in value)
  )


def _check_tiling(
  path: pathlib.Path, tensors: Mapping[str, Tensor], start: int, file_size: int
) -> None:
  """Rejects holes, overlaps, and a body of a different length."""
  position = start
  for begin, end in sorted((t.begin, t.end) for t in tensors.values()):
    if begin != position:
      raise malformed(path, f"byte {position} is in no tensor, or in two")
    position = end
  if position != file_size:
    raise malformed(
      path, f"its tensors end at byte {position}, the file at {file_size}"
    )
