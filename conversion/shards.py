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
from typing import Any

import numpy as np
import xxhash

from atlas_jax import errors
from conversion import arrays, header, process_group

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_MAX_JSON_BYTES = 64 * 2**20
# More gain nothing: memory is the limit.
_MAX_WRITERS = 8
_WRITE_BACK_BYTES = 16 * 2**20


def read(tensor: header.Tensor) -> np.ndarray:
  """Maps a tensor; bytes are read from disk where the array is touched."""
  body = np.memmap(tensor.file, np.uint8, "r")[tensor.begin : tensor.end]
  return np.asarray(body).view(tensor.dtype).reshape(tensor.shape)


def read_ahead(
  tensor: header.Tensor, mapped: np.ndarray, part: np.ndarray
) -> None:
  """Has the disk fetch part of a tensor that `read` mapped.

  A disk is faster if it is asked for much at once than page by page.
  """
  low, high = np.lib.array_utils.byte_bounds(part)
  start = tensor.begin + low - np.lib.array_utils.byte_bounds(mapped)[0]
  with tensor.file.open("rb") as file:
    os.posix_fadvise(file.fileno(), start, high - low, os.POSIX_FADV_WILLNEED)


def new_digest() -> xxhash.xxh3_128:
  """Begins the digest of a file: XXH3, of 128 bits.

  It finds altered and torn bytes at the speed of memory; a hash that nobody
  can forge takes 16 times as long, more than all else that a write does.
  """
  return xxhash.xxh3_128()


def digest(array: np.ndarray) -> str:
  """Computes the digest of an array's bytes in C order."""
  taken = new_digest()
  taken.update(_bytes_of(array))
  return taken.hexdigest()


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
  """Writes tensors and their index, reads all back and compares.

  Args:
    directory: an existing one, without weights.
    shapes: the tensors in the order they are written.
    fetch: see `write_files`.
    dtype: see `write_files`.
    max_shard_bytes: see `layout`.

  Returns:
    The digest of each file.

  Raises:
    errors.CheckpointError: see `write_files`.
  """
  files = layout(shapes, dtype=dtype, max_shard_bytes=max_shard_bytes)
  digests = write_files(directory, files, shapes, fetch, dtype=dtype)
  write_index(directory, files, shapes, dtype)
  open_directory(directory)
  return digests


def write_files(
  directory: pathlib.Path,
  files: Mapping[str, Sequence[str]],
  shapes: Mapping[str, tuple[int, ...]],
  fetch: Callable[[str], np.ndarray],
  *,
  dtype: str,
  with_read_back: bool = True,
  share: process_group.ProcessShare = process_group.ALONE,
  elsewhere: Callable[[str], object] = lambda _: None,
) -> dict[str, str]:
  """Writes this process's share of some files of tensors, several at once.

  This is the only writer of safetensors in the project: it makes every array
  contiguous first, since the public library writes the bytes of a transposed
  view in the wrong order without a word.

  Args:
    directory: an existing one.
    files: as `layout` gives it; the same in every process.
    shapes: of all tensors.
    fetch: gives a tensor by name; called once for each, by the thread that
      called this. One tensor of each file being written is in memory, and one
      more.
    dtype: "float32", "float16" or "bfloat16"; arrays are cast to it.
    with_read_back: whether to compare each file with what was written.
    share: which of several processes this is.
    elsewhere: called in place of `fetch` for tensors that other processes
      write, so that all go through the tensors in the same order, even those
      that could not write theirs.

  Returns:
    The digest of each file of this process; see `new_digest`.

  Raises:
    errors.CheckpointError: if a value is not finite, or a file read back
      differs from what was written.
    OSError: if the disk refuses.
  """
  mine = min(_MAX_WRITERS, os.cpu_count() or 1)
  writers = min(map(int, share.together(lambda: str(mine))))
  failed: errors.AtlasError | OSError | None = None
  with _Writer(directory, files, shapes, dtype, with_read_back) as writer:
    for lane, file, name in _in_step(files, shapes, share.count * writers):
      if lane % share.count != share.index or failed:
        elsewhere(name)
        continue
      try:
        writer.add(lane, file, name, fetch(name))
      except (errors.AtlasError, OSError) as error:
        if share.count == 1:
          raise
        failed = error
    if failed:
      raise failed
    return writer.finish()


def _in_step(
  files: Mapping[str, Sequence[str]],
  shapes: Mapping[str, tuple[int, ...]],
  num_lanes: int,
) -> list[tuple[int, str, str]]:
  """Orders tensors so that lanes, which write files one by one, keep pace.

  Returns:
    Lane, file and name of each.
  """
  sizes = {
    file: sum(math.prod(shapes[name]) for name in names)
    for file, names in files.items()
  }
  steps = []
  for lane, part in enumerate(process_group.divide(sizes, num_lanes)):
    done = 0
    for file in part:
      for name in files[file]:
        steps.append((done, lane, file, name))
        done += math.prod(shapes[name])
  steps.sort(key=lambda step: step[:2])  # Stable: a file keeps its order.
  return [step[1:] for step in steps]


class _Writer:
  """Writes files in threads: of each lane one tensor at a time.

  Files are waited for, until they are on disk, while the next are written.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    files: Mapping[str, Sequence[str]],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    with_read_back: bool,
  ) -> None:
    self._directory, self._files, self._shapes = directory, files, shapes
    self._dtype, self._with_read_back = np.dtype(dtype), with_read_back
    self._pool = concurrent.futures.ThreadPoolExecutor()
    self._opened: dict[str, _File] = {}
    self._steps: dict[int, concurrent.futures.Future[None]] = {}
    self._ends: dict[str, concurrent.futures.Future[str]] = {}

  def __enter__(self) -> "_Writer":
    return self

  def __exit__(self, *_: object) -> None:
    self._pool.shutdown(cancel_futures=True)
    for file in self._opened.values():
      file.close()

  def add(self, lane: int, file: str, name: str, array: np.ndarray) -> None:
    """Begins to write a tensor, once the one before it is written."""
    if lane in self._steps:
      self._steps.pop(lane).result()
    self._steps[lane] = self._pool.submit(self._add, file, name, array)

  def _add(self, file: str, name: str, array: np.ndarray) -> None:
    names = self._files[file]
    if name == names[0]:
      shapes = {name: self._shapes[name] for name in names}
      self._opened[file] = _File(self._directory / file, shapes, self._dtype)
    self._opened[file].add(name, array)
    if name == names[-1]:
      self._ends[file] = self._pool.submit(self._end, file)

  def _end(self, file: str) -> str:
    return self._opened[file].end(with_read_back=self._with_read_back)

  def finish(self) -> dict[str, str]:
    """Waits until all is on disk; gives the digest of each file."""
    for step in self._steps.values():
      step.result()
    ends = self._ends
    return {file: ends[file].result() for file in self._files if file in ends}


class _File:
  """A file of tensors that is being written."""

  def __init__(
    self,
    path: pathlib.Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
  ) -> None:
    self._path, self._shapes, self._dtype = path, shapes, dtype
    self._digest = new_digest()
    self._file = path.open("wb", buffering=0)
    self._begun = self._end = 0
    self._write(memoryview(header.make(shapes, dtype)))

  def _write(self, data: memoryview) -> None:
    self._digest.update(data)
    self._end += len(data)
    while data:  # A disk that is nearly full takes a part.
      data = data[self._file.write(data) :]
    if self._end - self._begun >= _WRITE_BACK_BYTES:
      # Else the disk would have nothing to do until the end. Linux begins to
      # write what it is told to forget, and cannot forget before it is written.
      os.posix_fadvise(
        *(self._file.fileno(), self._begun, self._end - self._begun),
        os.POSIX_FADV_DONTNEED,
      )
      self._begun = self._end

  def add(self, name: str, array: np.ndarray) -> None:
    """Writes the next tensor."""
    shape = self._shapes[name]
    if array.shape != shape:
      raise ValueError(f"{name} has shape {array.shape}, expected {shape}.")
    # Memory is slower than all of these: each piece is read from it once.
    for piece in arrays.pieces(array, self._dtype):
      arrays.check_finite(name, piece)
      self._write(_bytes_of(piece))

  def end(self, *, with_read_back: bool) -> str:
    """Waits until the file is on disk; gives its digest."""
    os.fsync(self._file.fileno())
    self.close()
    digest = self._digest.hexdigest()
    if with_read_back and _digest_of_file(self._path) != digest:
      raise header.refuse(self._path, "read back, it is not what was written")
    return digest

  def close(self) -> None:
    """Lets go of the file, whole or not."""
    self._file.close()


def _digest_of_file(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, new_digest).hexdigest()


def layout(
  shapes: Mapping[str, tuple[int, ...]], *, dtype: str, max_shard_bytes: int
) -> dict[str, list[str]]:
  """Spreads tensors over files, in order.

  Args:
    shapes: of all tensors.
    dtype: that they are written in.
    max_shard_bytes: a file closes before it grows past this, unless one tensor
      alone is larger.

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
