# SPDX-License-Identifier: Apache-2.0
"""Tensors in and out of a directory of `*.safetensors` files.

Reading is a memory map; there is one writer, and what it wrote is read back.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import concurrent.futures
import hashlib
import json
import math
import os
import pathlib
import threading
from typing import Any, Protocol

import numpy as np
import xxhash

from atlas_jax import errors
from conversion import arrays, header

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_MAX_JSON_BYTES = 64 * 2**20
# More writers gain nothing: memory is the limit. Each holds one tensor.
_MAX_WRITERS = 8


class Digest(Protocol):
  """A hash in the making, such as hashlib's."""

  def update(self, data: memoryview, /) -> object:
    """Takes in more bytes."""
    ...

  def hexdigest(self) -> str:
    """Gives the digest of all bytes so far."""
    ...


def read(tensor: header.Tensor) -> np.ndarray:
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
      raise header.refuse(path, f"it is larger than {_MAX_JSON_BYTES} bytes")
    value = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    raise errors.CheckpointError(
      f"{path.name} is missing.",
      where=str(path),
      why="A model directory in Hugging Face format holds this file.",
      fix="Check the path, or fetch the model again.",
    ) from error
  except (OSError, ValueError, RecursionError) as error:
    raise header.refuse(path, f"it cannot be read as JSON ({error})") from error
  if not isinstance(value, dict):
    raise header.refuse(
      path, f"it holds a {type(value).__name__}, not an object"
    )
  return value


def open_directory(directory: pathlib.Path) -> dict[str, header.Tensor]:
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
    return header.read(directory / SINGLE_NAME)

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
  tensors: dict[str, header.Tensor] = {}
  for file in sorted(listed):
    names = {name for name, shard in weight_map.items() if shard == file}
    found = header.read(directory / file)
    if found.keys() != names:
      wrong = sorted(found.keys() ^ names)[:8]
      raise header.refuse(
        directory / file, f"the index disagrees about {wrong}"
      )
    tensors |= found
  return tensors


def write(
  directory: pathlib.Path,
  shapes: Mapping[str, tuple[int, ...]],
  fetch: Callable[[str], np.ndarray],
  *,
  dtype: str,
  max_shard_bytes: int,
) -> dict[str, str]:
  """Writes tensors, reads all back and compares.

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
  # SHA-256 is for those who open the files; reading back, xxh3 is as good
  # against altered bytes, and 16 times faster.
  digests = write_files(
    directory,
    files,
    shapes,
    fetch,
    dtype=dtype,
    digests=(hashlib.sha256, xxhash.xxh3_128),
  )
  write_index(directory, files, shapes, dtype)
  open_directory(directory)
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    found = pool.map(_digest_of_file, [directory / file for file in files])
    for file, digest in zip(files, found, strict=True):
      if digest != digests[file][1]:
        raise header.refuse(
          directory, f"{file} read back is not what was written"
        )
  return {file: sha256 for file, (sha256, _) in digests.items()}


def write_files(
  directory: pathlib.Path,
  files: Mapping[str, Sequence[str]],
  shapes: Mapping[str, tuple[int, ...]],
  fetch: Callable[[str], np.ndarray],
  *,
  dtype: str,
  digests: Sequence[Callable[[], Digest]],
) -> dict[str, list[str]]:
  """Writes files of tensors, several at once; see `write`.

  Args:
    directory: an existing one.
    files: as `layout` gives it.
    shapes: of all tensors.
    fetch: see `write`; called by one thread at a time, with one tensor of each
      file in memory.
    dtype: see `write`.
    digests: each makes what takes the bytes of a file as they are written.

  Returns:
    The digests of each file.

  Raises:
    errors.CheckpointError: if a value is not finite.
  """
  # Devices must see the programs of one thread before those of another.
  turn = threading.Lock()

  def fetch_in_turn(name: str) -> np.ndarray:
    with turn:
      return fetch(name)

  def write_one(file: str) -> list[str]:
    part = {name: shapes[name] for name in files[file]}
    taken = [new() for new in digests]
    write_file(
      directory / file, part, fetch_in_turn, dtype=dtype, digests=taken
    )
    return [digest.hexdigest() for digest in taken]

  workers = min(_MAX_WRITERS, os.cpu_count() or 1)
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    return dict(zip(files, pool.map(write_one, files), strict=True))


def _digest_of_file(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


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
  digests: Sequence[Digest],
) -> None:
  """Writes one file of tensors, and waits until it is on disk.

  Args:
    path: the file.
    shapes: see `write`.
    fetch: see `write`; one tensor is in memory at a time.
    dtype: see `write`.
    digests: new ones; they take the file's bytes as they are written.

  Raises:
    errors.CheckpointError: if a value is not finite.
  """
  as_dtype = np.dtype(dtype)
  head = header.make(shapes, as_dtype)
  for digest in digests:
    digest.update(memoryview(head))
  with path.open("wb") as file:
    file.write(head)
    for name, shape in shapes.items():
      array = fetch(name)
      if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, expected {shape}.")
      # Memory is slower than all of these: each piece is read from it once.
      for piece in arrays.pieces(array, as_dtype):
        arrays.check_finite(name, piece)
        for digest in digests:
          digest.update(_bytes_of(piece))
        file.write(_bytes_of(piece))
    file.flush()
    os.fsync(file.fileno())


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


def _bytes_of(array: np.ndarray) -> memoryview:
  # bfloat16 has no buffer protocol of its own, so bytes are viewed as uint8.
  return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _read_index(path: pathlib.Path) -> dict[str, str]:
  """Reads which file holds which tensor; names may not leave the directory."""
  weight_map = read_json(path).get("weight_map")
  if not isinstance(weight_map, dict) or len(weight_map) > header.MAX_TENSORS:
    raise header.refuse(path, "weight_map is no object of a sane size")
  for name, file in weight_map.items():
    if not isinstance(file, str) or "\0" in file or "\\" in file:
      raise header.refuse(
        path, f"{name!r} is in {file!r}, which is no file name"
      )
    if file != pathlib.PurePosixPath(file).name or file in ("", ".", ".."):
      raise header.refuse(path, f"{file!r} points outside of the directory")
  return weight_map


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
