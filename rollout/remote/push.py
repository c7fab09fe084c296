# SPDX-License-Identifier: Apache-2.0
"""Publishes the policy's weights as files for rollout servers.

Each version is a directory. It is written under a temporary name, its manifest
last, and renamed when every byte is on disk. A server therefore sees a version
completely or not at all, even if the trainer is killed.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import os
import pathlib
import re
import shutil
import time
from typing import Any, Literal

from atlas_jax import errors
from atlas_jax.models import decoder
from conversion import process_group, rules, save, shards
from rollout import manifest

_OURS = re.compile(r"(\d+)(\.tmp-\d+)?")
Dtype = Literal["float32", "bfloat16"]
_DTYPES: dict[Dtype, Literal["F32", "BF16"]] = {
  "float32": "F32",
  "bfloat16": "BF16",
}
_JsonFile = dict[str, Any]  # Any: the JSON of a `manifest.File`.


@dataclasses.dataclass(frozen=True)
class Published:
  """A version that servers can load; `digest` is that of its manifest."""

  version: int
  digest: str
  path: pathlib.Path
  num_bytes: int
  seconds: float


def open_root(directory: str, *, run: str) -> pathlib.Path:
  """Creates the directory of versions, unless it exists.

  Args:
    directory: on a disk that trainer and servers share; "" for one in the
      memory of this machine.
    run: name of this run's directory in memory.

  Raises:
    errors.ConfigError: if it cannot be created, or belongs to another user.
  """
  parent = pathlib.Path(f"/dev/shm/atlas_jax-{os.getuid()}")
  root = pathlib.Path(directory) if directory else parent / run
  try:
    if not directory:
      # /dev/shm is world-writable, so another user may own this name.
      parent.mkdir(mode=0o700, exist_ok=True)
      if parent.is_symlink() or parent.stat().st_uid != os.getuid():
        raise PermissionError(f"{parent} belongs to another user")
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
  except OSError as error:
    raise errors.ConfigError(
      "The directory for published weights cannot be created.",
      where=f"--config.rollout.weights_root={directory}",
      why=str(error),
      fix="Set it to a folder that trainer and servers can read and write.",
    ) from error
  return root.resolve()


def publish(
  params: decoder.Params,
  model: decoder.Model,
  root: pathlib.Path,
  version: int,
  *,
  source: pathlib.Path,
  dtype: Dtype,
  max_shard_bytes: int,
  share: process_group.ProcessShare = process_group.ALONE,
) -> Published:
  """Writes one version, completely or not at all.

  Tensors are transferred from their devices to the files one by one and hashed
  on the way, so no file is read back.

  Args:
    params: of `model`, which may be sharded over processes.
    model: of the parameters.
    root: see `open_root`; receives the directory of the version.
    version: the step whose weights these are.
    source: the model's Hugging Face directory; its config is copied.
    dtype: of the written tensors.
    max_shard_bytes: see `shards.layout`; files are written in parallel.
    share: this process's share; all processes call this and see `root`.

  Raises:
    errors.DivergedError: if a weight is not finite.
    errors.RolloutError: if a file operation fails. An error in one process is
      raised in all.
  """
  start = time.monotonic()

  def write_part(partial: pathlib.Path) -> dict[str, _JsonFile]:
    # `root` may have a different path in process 0.
    here = root / partial.name
    with _disk_errors(here):
      _check_visible(here)
      return _write_weights(
        here,
        save.Tensors(params, model, dtype),
        model,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        share=share,
      )

  def finish(
    partial: pathlib.Path, files: dict[str, _JsonFile]
  ) -> tuple[str, int]:
    with _disk_errors(partial):
      return _seal(partial, version, files, model, dtype)

  path = manifest.directory_of(root, version)
  digest, num_bytes = process_group.write_directory(
    share, _partial_version(path, source), write_part, finish
  )
  return Published(version, digest, path, num_bytes, time.monotonic() - start)


@contextlib.contextmanager
def _partial_version(
  path: pathlib.Path, source: pathlib.Path
) -> Iterator[pathlib.Path]:
  """Yields a private directory with the config, and renames it to `path`.

  It is removed after an error.
  """
  partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
  try:
    with _disk_errors(partial):
      shutil.rmtree(partial, ignore_errors=True)
      partial.mkdir()
      shards.write_json(
        partial / "config.json", shards.read_json(source / "config.json")
      )
    yield partial
    with _disk_errors(partial):
      shutil.rmtree(path, ignore_errors=True)
      partial.rename(path)
      _sync(path.parent)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _disk_errors(directory: pathlib.Path) -> Iterator[None]:
  """Converts an `OSError` while writing a version to a `RolloutError`."""
  try:
    yield
  except OSError as error:
    raise errors.RolloutError(
      "Failed to write the weights for the rollout servers.",
      where=str(directory),
      why=str(error),
      fix="Check free space and permissions, or set "
      "--config.rollout.weights_root to a larger disk.",
    ) from error


def _check_visible(directory: pathlib.Path) -> None:
  """Checks that this process sees the folder that process 0 created."""
  if not directory.is_dir():
    raise errors.RolloutError(
      "weights_root is not shared by all processes.",
      where=str(directory),
      why="Process 0 created this folder, but this process cannot see it.",
      fix="Set --config.rollout.weights_root to a folder on a disk that all "
      "processes and all servers share.",
    )


def prune(root: pathlib.Path, *, keep: int) -> None:
  """Removes unfinished versions and all others but the newest `keep`.

  Other files in the directory are left alone.
  """
  versions: list[int] = []
  for path in root.iterdir():
    if not (match := _OURS.fullmatch(path.name)):
      continue
    if match[2]:
      shutil.rmtree(path, ignore_errors=True)
    else:
      versions.append(int(match[1]))
  for version in sorted(versions, reverse=True)[keep:]:
    shutil.rmtree(manifest.directory_of(root, version), ignore_errors=True)


def _write_weights(
  directory: pathlib.Path,
  tensors: save.Tensors,
  model: decoder.Model,
  *,
  dtype: str,
  max_shard_bytes: int,
  share: process_group.ProcessShare,
) -> dict[str, _JsonFile]:
  """Writes this process's files of tensors, and in process 0 their index."""
  shapes = rules.shapes(model)
  layout = shards.layout(shapes, dtype=dtype, max_shard_bytes=max_shard_bytes)
  try:
    digests = shards.write_files(
      directory,
      layout,
      shapes,
      tensors.fetch,
      dtype=dtype,
      with_read_back=False,  # Servers verify the digests.
      share=share,
      on_skip=tensors.join_fetch,
    )
  except errors.CheckpointError as error:
    raise errors.DivergedError(
      "The policy's weights are not finite.",
      where=error.where,
      why=error.why,
      fix="Lower the learning rate and resume from the last checkpoint.",
    ) from error
  if share.index == 0:
    shards.write_index(directory, layout, shapes, dtype)
  return {
    file: {"size": (directory / file).stat().st_size, "digest": digest}
    for file, digest in digests.items()
  }


def _seal(
  directory: pathlib.Path,
  version: int,
  weights: dict[str, _JsonFile],
  model: decoder.Model,
  dtype: Dtype,
) -> tuple[str, int]:
  """Writes the manifest; returns its digest and the bytes of all files."""
  texts = {
    file.name: manifest.describe(file) for file in directory.glob("*.json")
  }
  files = {
    name: manifest.File(**fields) for name, fields in weights.items()
  } | texts
  tensors = {
    name: manifest.Tensor(shape=shape, dtype=_DTYPES[dtype])
    for name, shape in rules.shapes(model).items()
  }
  digest = manifest.write(
    directory, manifest.Manifest(version=version, files=files, tensors=tensors)
  )
  _sync(directory)
  return digest, sum(file.size for file in files.values())


def _sync(directory: pathlib.Path) -> None:
  """Flushes the entries of a directory to disk."""
  handle = os.open(directory, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)
