# SPDX-License-Identifier: Apache-2.0
"""Reads and writes tensors in a directory of `*.safetensors` files.

Reading memory-maps the files. All writing goes through one writer, which reads
its files back.
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
# More do not help: memory bandwidth is the limit.
_MAX_WRITERS = 8
_WRITE_BACK_BYTES = 16 * 2**20


def read(tensor: header.Tensor) -> np.ndarray:
  """Memory-maps a tensor; bytes are read from disk on access."""
  body = np.memmap(tensor.file, np.uint8, "r")[tensor.begin : tensor.end]
  return np.asarray(body).view(tensor.dtype).reshape(tensor.shape)


def read_ahead(
  tensor: header.Tensor, mapped: np.ndarray, part: np.ndarray
) -> None:
  """Asks the disk to prefetch part of a tensor that `read` mapped.

  One large request is faster than a page fault for every page.
  """
  low, high = np.lib.array_utils.byte_bounds(part)
  start = tensor.begin + low - np.lib.array_utils.byte_bounds(mapped)[0]
  with tensor.file.open("rb") as file:
    os.posix_fadvise(file.fileno(), start, high - low, os.POSIX_FADV_WILLNEED)


def new_digest() -> xxhash.xxh3_128:
  """Returns a new digest for a file: XXH3 with 128 bits.

  It detects altered and torn bytes at memory speed. A cryptographic hash takes
  16 times as long, more than the rest of a write.
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
    errors.CheckpointError: if it is absent, unreadable or not a JSON object.
  """
  try:
    if path.stat().st_size > _MAX_JSON_BYTES:
      raise header.malformed(path, f"it is larger than {_MAX_JSON_BYTES} bytes")
    value = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    raise errors.CheckpointError(
      f"{path.name} is missing.",
      where=str(path),
      why="A model directory in Hugging Face format has this file.",
      fix="Check the path, or download the model again.",
    ) from error
  except (OSError, ValueError, RecursionError) as error:
    raise header.malformed(
      path, f"it cannot be read as JSON ({error})"
    ) from error
  if not isinstance(value, dict):
    raise header.malformed(
      path, f"it holds a {type(value).__name__}, not an object"
    )
  return value


def check_is_model(directory: pathlib.Path) -> None:
  """Rejects the workdir of a run, whose model is in `export`.

  Raises:
    errors.CheckpointError: if it is one.
  """
  export = directory / "export"
  has_export = (export / "config.json").is_file()
  is_workdir = has_export or (directory / "checkpoints").is_dir()
  if not is_workdir or any(directory.glob("*.safetensors")):
    return
  raise errors.CheckpointError(
    "This is the workdir of a run, not a model.",
    where=str(directory),
    why="A run writes its model to the folder export, at its end.",
    fix=f"Did you mean {export}?"
    if has_export
    else "Finish the run, or convert its newest checkpoint: python -m "
    f"scripts.convert to_hf {directory} OUT --source=MODEL.",
  )


def open_directory(directory: pathlib.Path) -> dict[str, header.Tensor]:
  """Lists the tensors of a model directory, single file or sharded.

  Only headers are read. Symbolic links are followed, since the Hub's cache
  consists of them.

  Raises:
    errors.CheckpointError: if a file is absent, unexpected or malformed, or the
      index and the files disagree.
  """
  if not directory.is_dir():
    raise errors.CheckpointError(
      "The model directory cannot be opened.",
      where=str(directory),
      why="It is a file." if directory.exists() else "It does not exist.",
      fix="Pass the directory that holds config.json and *.safetensors.",
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
      fix="Download the missing files again; remove those not in the index.",
    )
  tensors: dict[str, header.Tensor] = {}
  for file in sorted(listed):
    names = {name for name, shard in weight_map.items() if shard == file}
    found = header.read(directory / file)
    if found.keys() != names:
      wrong = sorted(found.keys() ^ names)[:8]
      raise header.malformed(
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
    shapes: of the tensors, in the order in which they are written.
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
  on_skip: Callable[[str], object] = lambda _: None,
) -> dict[str, str]:
  """Writes this process's share of the files, several files in parallel.

  This is the only safetensors writer of the project. It makes every array
  contiguous first: the public library silently writes the bytes of a transposed
  view in the wrong order.

  Args:
    directory: an existing one.
    files: as `layout` returns it; the same in every process.
    shapes: of all tensors.
    fetch: returns a tensor by name; called once for each, in the calling
      thread. Memory holds one tensor of each open file, and one more.
    dtype: "float32", "float16" or "bfloat16"; arrays are cast to it.
    with_read_back: whether to compare each file with what was written.
    share: this process's share.
    on_skip: called instead of `fetch` for tensors that other processes write,
      and for the remaining tensors after an error, so that all processes visit
      the tensors in the same order.

  Returns:
    The digest of each file of this process; see `new_digest`.

  Raises:
    errors.CheckpointError: if a value is not finite, or a file read back
      differs from what was written.
    OSError: if a write fails.
  """
  mine = min(_MAX_WRITERS, os.cpu_count() or 1)
  writers = min(map(int, share.together(lambda: str(mine))))
  failed: errors.AtlasError | OSError | None = None
  with _Writer(directory, files, shapes, dtype, with_read_back) as writer:
    for lane, file, name in _in_step(files, shapes, share.count * writers):
      if lane % share.count != share.index or failed:
        on_skip(name)
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
  """Orders tensors so that lanes advance by equal bytes.

  A lane is a sequence of files written one after the other.

  Returns:
    Lane, file and name of each tensor.
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
  """Writes files in threads, one tensor per lane at a time.

  It syncs complete files to disk while the next ones are written.
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
    """Starts to write a tensor once the previous one of its lane is written."""
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
    """Waits until all files are on disk; returns the digest of each."""
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
    while data:  # A write to a nearly full disk may be partial.
      data = data[self._file.write(data) :]
    if self._end - self._begun >= _WRITE_BACK_BYTES:
      # Otherwise the disk would be idle until fsync. DONTNEED makes Linux start
      # to write these pages, since it cannot drop them before.
      os.posix_fadvise(
        self._file.fileno(),
        self._begun,
        self._end - self._begun,
        os.POSIX_FADV_DONTNEED,
      )
      self._begun = self._end

  def add(self, name: str, array: np.ndarray) -> None:
    """Writes the next tensor."""
    shape = self._shapes[name]
    if array.shape != shape:
      raise ValueError(f"{name} has shape {array.shape}, expected {shape}.")
    # Memory bandwidth is the limit: each piece is loaded into the cache once.
    for piece in arrays.pieces(array, self._dtype):
      arrays.check_finite(name, piece)
      self._write(_bytes_of(piece))

  def end(self, *, with_read_back: bool) -> str:
    """Waits until the file is on disk; returns its digest."""
    os.fsync(self._file.fileno())
    self.close()
    digest = self._digest.hexdigest()
    if with_read_back and _digest_of_file(self._path) != digest:
      raise header.malformed(self._path, "its bytes read back differ")
    return digest

  def close(self) -> None:
    """Closes the file, complete or not."""
    self._file.close()


def _digest_of_file(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, new_digest).hexdigest()


def layout(
  shapes: Mapping[str, tuple[int, ...]], *, dtype: str, max_shard_bytes: int
) -> dict[str, list[str]]:
  """Distributes tensors over files, in order.

  Args:
    shapes: of all tensors.
    dtype: in which they are written.
    max_shard_bytes: maximum size of the tensors in a file, unless a single
      tensor is larger.

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
  """Writes the index of tensors by file, if there are several files."""
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
  # bfloat16 does not support the buffer protocol; uint8 does.
  return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _read_index(path: pathlib.Path) -> dict[str, str]:
  """Reads the file of each tensor; file names must stay in the directory."""
  weight_map = read_json(path).get("weight_map")
  if not isinstance(weight_map, dict) or len(weight_map) > header.MAX_TENSORS:
    raise header.malformed(
      path, f"weight_map must be an object of at most {header.MAX_TENSORS} keys"
    )
  for name, file in weight_map.items():
    if not isinstance(file, str) or "\0" in file or "\\" in file:
      raise header.malformed(
        path, f"{name!r} is in {file!r}, which is not a file name"
      )
    if file != pathlib.PurePosixPath(file).name or file in ("", ".", ".."):
      raise header.malformed(path, f"{file!r} points outside of the directory")
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
      "Pickled weights are not supported.",
      where=f"{directory}: {pickled[:4]}",
      why="A pickled file can execute code when it is loaded.",
      fix="If you trust it, convert it: python -c 'from transformers import "
      "AutoModelForCausalLM as M, AutoTokenizer as T; "
      f'p = "{directory}"; o = "{directory}-safetensors"; '
      "M.from_pretrained(p).save_pretrained(o); "
      "T.from_pretrained(p).save_pretrained(o)'",
    )
  return errors.CheckpointError(
    "No weights found.",
    where=str(directory),
    why=f"Expected {SINGLE_NAME} alone, or {INDEX_NAME} with its files; "
    f"found {sorted(present) or 'neither'}.",
    fix="Download the model again.",
  )
