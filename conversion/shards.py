# SPDX-License-Identifier: Apache-2.0
"""Tensors in and out of a directory of `*.safetensors` files.

A file is eight bytes of header length, a JSON header and the tensors' bytes.
Files come from strangers, so everything the header claims is checked against
the file before any tensor is touched; reading is then a memory map.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import reprlib
from typing import Any, Protocol, TypeGuard

import ml_dtypes
import numpy as np

from atlas_jax import errors
from conversion import arrays

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_DTYPES = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LENGTH_BYTES = 8
# The largest public checkpoints stay below a tenth of each of these.
_MAX_JSON_BYTES = 64 * 2**20
_MAX_HEADER_BYTES = 16 * 2**20
_MAX_TENSORS = 100_000


class Digest(Protocol):
  """A hash in the making, such as hashlib's."""

  def update(self, data: memoryview, /) -> object:
    """Takes in more bytes."""
    ...

  def hexdigest(self) -> str:
    """Gives the digest of all bytes so far."""
    ...


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where one tensor's bytes are."""

  file: pathlib.Path
  dtype: np.dtype
  shape: tuple[int, ...]
  begin: int
  end: int


def read(tensor: Tensor) -> np.ndarray:
  """Maps a tensor; bytes are read from disk where the array is touched."""
  body = np.memmap(tensor.file, np.uint8, "r")[tensor.begin : tensor.end]
  return np.asarray(body).view(tensor.dtype).reshape(tensor.shape)


def digest(array: np.ndarray) -> str:
  """Computes the SHA-256 of an array's bytes in C order."""
  return hashlib.sha256(_bytes_of(array)).hexdigest()


def read_json(path: pathlib.Path) -> dict[str, Any]:  # Any: a JSON object.
  """Reads a file that holds one JSON object.

  Raises:
    errors.CheckpointError: if it is absent, unreadable or holds anything else.
  """
  try:
    if path.stat().st_size > _MAX_JSON_BYTES:
      raise _refuse(path, f"it is larger than {_MAX_JSON_BYTES} bytes")
    value = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    raise errors.CheckpointError(
      f"{path.name} is missing.",
      where=str(path),
      why="A model directory in Hugging Face format holds this file.",
      fix="Check the path, or fetch the model again.",
    ) from error
  except (OSError, ValueError, RecursionError) as error:
    raise _refuse(path, f"it cannot be read as JSON ({error})") from error
  if not isinstance(value, dict):
    raise _refuse(path, f"it holds a {type(value).__name__}, not an object")
  return value


def open_directory(directory: pathlib.Path) -> dict[str, Tensor]:
  """Finds every tensor of a model directory, single file or sharded.

  Only headers are read. Symbolic links are followed: the hub's cache is made
  of them.

  Raises:
    errors.CheckpointError: if a file is absent, left over or malformed, or the
      index and the files disagree.
  """
  if not directory.is_dir():
    raise errors.CheckpointError(
      "The model directory cannot be opened.",
      where=str(directory),
      why="It is a file." if directory.exists() else "It does not exist.",
      fix="Give the directory that holds config.json and *.safetensors.",
    )
  present = {path.name for path in directory.glob("model*.safetensors")}
  if not (directory / INDEX_NAME).exists():
    if present != {SINGLE_NAME}:
      raise _no_weights(directory, present)
    return read_header(directory / SINGLE_NAME)

  weight_map = _read_index(directory / INDEX_NAME)
  listed = set(weight_map.values())
  if listed != present:
    raise errors.CheckpointError(
      "The index and the weight files disagree.",
      where=str(directory / INDEX_NAME),
      why=f"Missing: {sorted(listed - present)}; "
      f"not in the index: {sorted(present - listed)}.",
      fix="Fetch the missing files again; remove those left over.",
    )
  tensors: dict[str, Tensor] = {}
  for file in sorted(listed):
    names = {name for name, shard in weight_map.items() if shard == file}
    header = read_header(directory / file)
    if header.keys() != names:
      wrong = sorted(header.keys() ^ names)[:8]
      raise _refuse(directory / file, f"the index disagrees about {wrong}")
    tensors |= header
  return tensors


def read_header(path: pathlib.Path) -> dict[str, Tensor]:
  """Reads and checks the header of one file.

  Raises:
    errors.CheckpointError: unless the tensors tile the body of the file
      exactly, each with a supported dtype and the size its shape needs.
  """
  try:
    with path.open("rb") as file:
      file_size = os.fstat(file.fileno()).st_size
      length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
      start = _LENGTH_BYTES + length
      if length > _MAX_HEADER_BYTES or start > file_size:
        raise _refuse(
          path, f"its header claims {length} bytes in a file of {file_size}"
        )
      header = json.loads(file.read(length), object_pairs_hook=_unique)
  except (OSError, ValueError, RecursionError) as error:
    raise _refuse(path, f"its header cannot be read ({error})") from error
  if not isinstance(header, dict) or len(header) > _MAX_TENSORS:
    raise _refuse(path, "its header is no object of a sane size")
  header.pop("__metadata__", None)
  tensors = {
    name: _entry(path, name, entry, start) for name, entry in header.items()
  }
  _check_tiling(path, tensors, start, file_size)
  return tensors


def write(
  directory: pathlib.Path,
  shapes: Mapping[str, tuple[int, ...]],
  fetch: Callable[[str], np.ndarray],
  *,
  dtype: str,
  max_shard_bytes: int,
) -> dict[str, str]:
  """Writes tensors one at a time, reads all back and compares.

  This is the only writer of safetensors in the project: it makes every array
  contiguous first, since the public library writes the bytes of a transposed
  view in the wrong order without a word.

  Args:
    directory: an existing one, without weights.
    shapes: the tensors in the order they are written.
    fetch: gives a tensor by name; called once for each.
    dtype: "float32", "float16" or "bfloat16"; arrays are cast to it.
    max_shard_bytes: a file closes before it grows past this, unless one
      tensor alone is larger.

  Returns:
    The SHA-256 of each file.

  Raises:
    errors.CheckpointError: if a value is not finite, or a tensor read back
      differs from what was written.
  """
  files = layout(shapes, dtype=dtype, max_shard_bytes=max_shard_bytes)
  digests = {
    file: write_file(
      directory / file,
      {name: shapes[name] for name in names},
      fetch,
      dtype=dtype,
      digest=hashlib.sha256(),
    )
    for file, names in files.items()
  }
  write_index(directory, files, shapes, dtype)
  open_directory(directory)
  for file, expected in digests.items():
    with (directory / file).open("rb") as written:
      if hashlib.file_digest(written, "sha256").hexdigest() != expected:
        raise _refuse(directory, f"{file} read back is not what was written")
  return digests


def layout(
  shapes: Mapping[str, tuple[int, ...]], *, dtype: str, max_shard_bytes: int
) -> dict[str, list[str]]:
  """Spreads tensors over files, in order; see `write`.

  Returns:
    The names of the tensors in each file, by the file's name.
  """
  itemsize = np.dtype(dtype).itemsize
  sizes = {name: math.prod(shape) * itemsize for name, shape in shapes.items()}
  groups = list(_pack(sizes, max_shard_bytes))
  if len(groups) == 1:
    return {SINGLE_NAME: groups[0]}
  return {
    f"model-{number:05d}-of-{len(groups):05d}.safetensors": names
    for number, names in enumerate(groups, 1)
  }


def write_index(
  directory: pathlib.Path,
  files: Mapping[str, Sequence[str]],
  shapes: Mapping[str, tuple[int, ...]],
  dtype: str,
) -> None:
  """Writes which file holds which tensor, if there are several files."""
  if len(files) == 1:
    return
  total = sum(map(math.prod, shapes.values())) * np.dtype(dtype).itemsize
  weight_map = {name: file for file, names in files.items() for name in names}
  write_json(
    directory / INDEX_NAME,
    {"metadata": {"total_size": total}, "weight_map": weight_map},
  )


def write_file(
  path: pathlib.Path,
  shapes: Mapping[str, tuple[int, ...]],
  fetch: Callable[[str], np.ndarray],
  *,
  dtype: str,
  digest: Digest,
) -> str:
  """Writes one file of tensors, and waits until it is on disk.

  Args:
    path: the file.
    shapes: see `write`.
    fetch: see `write`; one tensor is in memory at a time.
    dtype: see `write`.
    digest: a new one; it takes the file's bytes as they are written.

  Returns:
    The digest.

  Raises:
    errors.CheckpointError: if a value is not finite.
  """
  as_dtype = np.dtype(dtype)
  header = _header(shapes, as_dtype)
  digest.update(memoryview(header))
  with path.open("wb") as file:
    file.write(header)
    for name, shape in shapes.items():
      array = fetch(name)
      if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, expected {shape}.")
      # Memory is slower than all of these: each piece is read from it once.
      for piece in arrays.pieces(array, as_dtype):
        check_finite(name, piece)
        digest.update(_bytes_of(piece))
        file.write(_bytes_of(piece))
    file.flush()
    os.fsync(file.fileno())
  return digest.hexdigest()


def write_json(
  path: pathlib.Path,
  value: Mapping[str, Any],  # Any: JSON.
) -> None:
  """Writes a JSON object and waits until it is on disk."""
  with path.open("w", encoding="utf-8") as file:
    json.dump(value, file, indent=2, ensure_ascii=False, allow_nan=False)
    file.write("\n")
    file.flush()
    os.fsync(file.fileno())


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype) -> bytes:
  """Makes what stands before the tensors of a file, its length included."""
  # transformers refuses files that do not name a framework.
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


def _bytes_of(array: np.ndarray) -> memoryview:
  # bfloat16 has no buffer protocol of its own, so bytes are viewed as uint8.
  return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _read_index(path: pathlib.Path) -> dict[str, str]:
  """Reads which file holds which tensor; names may not leave the directory."""
  weight_map = read_json(path).get("weight_map")
  if not isinstance(weight_map, dict) or len(weight_map) > _MAX_TENSORS:
    raise _refuse(path, "weight_map is no object of a sane size")
  for name, file in weight_map.items():
    if not isinstance(file, str) or "\0" in file or "\\" in file:
      raise _refuse(path, f"{name!r} is in {file!r}, which is no file name")
    if file != pathlib.PurePosixPath(file).name or file in ("", ".", ".."):
      raise _refuse(path, f"{file!r} points outside of the directory")
  return weight_map


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:  # Any: JSON.
  fields = dict(pairs)
  if len(fields) != len(pairs):
    raise ValueError("a key is given twice")
  return fields


def _entry(
  path: pathlib.Path,
  name: str,
  entry: Any,  # Any: JSON from a stranger.
  start: int,
) -> Tensor:
  """Reads one tensor's entry; `start` is where the body begins."""
  if not isinstance(entry, dict):
    raise _refuse(path, f"the entry of {reprlib.repr(name)} is no object")
  kind, short = entry.get("dtype"), reprlib.repr(name)
  if not isinstance(kind, str) or kind not in _DTYPES:
    raise _refuse(
      path,
      f"{short} has dtype {reprlib.repr(kind)}; "
      f"supported are {sorted(_DTYPES)}",
      fix="Convert the weights to bfloat16 or float32 first.",
    )
  shape, offsets = entry.get("shape"), entry.get("data_offsets")
  if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
    given = f"shape {reprlib.repr(shape)}, offsets {reprlib.repr(offsets)}"
    raise _refuse(path, f"{short} has {given}")
  dtype, (begin, end) = _DTYPES[kind], offsets
  if math.prod(shape) * dtype.itemsize != end - begin:
    raise _refuse(
      path, f"{short} of shape {shape} does not take {end - begin} bytes"
    )
  return Tensor(path, dtype, tuple(shape), start + begin, start + end)


def _are_sizes(
  value: Any,  # Any: JSON from a stranger.
) -> TypeGuard[list[int]]:
  return (
    isinstance(value, list)
    and len(value) <= 8
    and all(type(size) is int and 0 <= size < 2**63 for size in value)
  )


def _check_tiling(
  path: pathlib.Path, tensors: Mapping[str, Tensor], start: int, file_size: int
) -> None:
  """Refuses holes, overlaps and a body of another length."""
  position = start
  for begin, end in sorted((t.begin, t.end) for t in tensors.values()):
    if begin != position:
      raise _refuse(path, f"byte {position} begins no tensor, or is in two")
    position = end
  if position != file_size:
    raise _refuse(
      path, f"its tensors end at byte {position}, the file at {file_size}"
    )


def _pack(
  sizes: Mapping[str, int], max_shard_bytes: int
) -> Iterator[list[str]]:
  """Groups tensors, in order, into files."""
  group: list[str] = []
  total = 0
  for name, size in sizes.items():
    if group and total + size > max_shard_bytes:
      yield group
      group, total = [], 0
    group.append(name)
    total += size
  yield group


def check_finite(name: str, array: np.ndarray) -> None:
  """Refuses a tensor, or part of one, that holds an infinity or a NaN.

  Raises:
    errors.CheckpointError: naming the tensor.
  """
  if not arrays.is_finite(array):
    count = int(array.size - np.isfinite(array).sum())
    raise errors.CheckpointError(
      "A weight is not finite.",
      where=name,
      why=f"At least {count} of its values are infinite or NaN.",
      fix="Go back to a checkpoint from before training diverged.",
    )


def _no_weights(
  directory: pathlib.Path, present: set[str]
) -> errors.CheckpointError:
  pickled = sorted(
    path.name
    for pattern in ("*.bin", "*.pt", "*.pth")
    for path in directory.glob(pattern)
  )
  if pickled and not present:
    return errors.CheckpointError(
      "The weights are in a format that is never opened.",
      where=f"{directory}: {pickled[:4]}",
      why="Pickled files can run code when they are opened.",
      fix="Convert it where you trust it: python -c 'from transformers import "
      "AutoModelForCausalLM as M, AutoTokenizer as T; "
      f'p = "{directory}"; o = "{directory}-safetensors"; '
      "M.from_pretrained(p).save_pretrained(o); "
      "T.from_pretrained(p).save_pretrained(o)'",
    )
  return errors.CheckpointError(
    "The weights cannot be found.",
    where=str(directory),
    why=f"Expected {SINGLE_NAME} alone, or {INDEX_NAME} with its files; "
    f"found {sorted(present) or 'neither'}.",
    fix="Fetch the model again.",
  )


def _refuse(
  path: pathlib.Path, why: str, fix: str = "Fetch or export the model again."
) -> errors.CheckpointError:
  return errors.CheckpointError(
    f"{path.name} is malformed.", where=str(path), why=f"{why}.", fix=fix
  )
