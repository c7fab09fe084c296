# SPDX-License-Identifier: Apache-2.0
"""Writes the policy's weights where rollout servers read them.

Each version is a directory: written under another name, its manifest last, and
renamed when every byte is on disk. So a server sees a version whole or not at
all, wherever the trainer is killed.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import time
from typing import Literal

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


@dataclasses.dataclass(frozen=True)
class Published:
  """A version that servers may load; `digest` is that of its manifest."""

  version: int
  digest: str
  path: pathlib.Path
  num_bytes: int
  seconds: float


def open_root(directory: str, *, run: str) -> pathlib.Path:
  """Makes the directory that versions are published in, unless it is there.

  Args:
    directory: on a disk that trainer and servers share; "" for one in the
      memory of this machine.
    run: names this run among those in memory.

  Raises:
    errors.ConfigError: if it cannot be made, or belongs to someone else.
  """
  parent = pathlib.Path(f"/dev/shm/atlas_jax-{os.getuid()}")
  root = pathlib.Path(directory) if directory else parent / run
  try:
    if not directory:
      # Anyone may make a name in /dev/shm, so it may have been taken.
      parent.mkdir(mode=0o700, exist_ok=True)
      if parent.is_symlink() or parent.stat().st_uid != os.getuid():
        raise PermissionError(f"{parent} belongs to someone else")
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
  except OSError as error:
    raise errors.ConfigError(
      "Weights cannot be handed to the rollout servers.",
      where=f"--config.rollout.weights_root={directory}",
      why=str(error),
      fix="Name a folder that trainer and servers can write and read.",
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
  """Writes one version, whole or not at all.

  Tensors go from their devices to the files one by one; digests are taken on
  the way, so nothing is read twice.

  Args:
    params: of `model`, on the devices of all that share it.
    model: what they are the parameters of.
    root: see `open_root`; the version becomes a directory in it.
    version: the step whose weights these are.
    source: the model's directory in Hugging Face format; its config goes along.
    dtype: of the tensors written.
    max_shard_bytes: see `shards.layout`; files are written in parallel.
    share: which of several processes this is; all call this, and see `root`.

  Raises:
    errors.DivergedError: if a weight is not finite.
    errors.RolloutError: if it cannot be written, or not by all.
  """
  start = time.monotonic()
  path = manifest.directory_of(root, version)
  # The first process's number; what another would make of it is not used.
  partial = root / f"{version}.tmp-{os.getpid()}"

  def begin() -> str:
    with _disk_errors(partial):
      if share.index == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        shards.write_json(
          partial / "config.json", shards.read_json(source / "config.json")
        )
    return partial.name

  def write_part() -> str:
    with _disk_errors(there):
      _check_seen(there)
      files = _write_weights(
        there,
        save.Tensors(params, model, dtype),
        model,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        share=share,
      )
    return json.dumps({name: file.model_dump() for name, file in files.items()})

  def end() -> str:
    if share.index:
      return ""
    with _disk_errors(partial):
      digest, num_bytes = _seal(partial, version, weights, model, dtype)
      shutil.rmtree(path, ignore_errors=True)
      partial.rename(path)
      _sync(root)
    return json.dumps([digest, num_bytes])

  try:
    there = root / share.together(begin)[0].strip()
    weights = {
      name: manifest.File(**fields)
      for part in share.together(write_part)
      for name, fields in json.loads(part).items()
    }
    digest, num_bytes = json.loads(share.together(end)[0])
  finally:
    if share.index == 0:
      shutil.rmtree(partial, ignore_errors=True)
  seconds = time.monotonic() - start
  return Published(version, digest, path, num_bytes, seconds)


@contextlib.contextmanager
def _disk_errors(directory: pathlib.Path) -> Iterator[None]:
  """Raises what a disk says against writing a version as a `RolloutError`."""
  try:
    yield
  except OSError as error:
    raise errors.RolloutError(
      "The weights cannot be handed to the rollout servers.",
      where=str(directory),
      why=str(error),
      fix="Check space and permissions there, or set "
      "--config.rollout.weights_root to a larger disk.",
    ) from error


def _check_seen(directory: pathlib.Path) -> None:
  """Refuses a folder that the first process has made, and this one lacks."""
  if not directory.is_dir():
    raise errors.RolloutError(
      "The weights cannot be handed to the rollout servers by all processes.",
      where=str(directory),
      why="The first process has made this folder, and here it is not.",
      fix="Set --config.rollout.weights_root to a folder on a disk that all "
      "processes and all servers share.",
    )


def prune(root: pathlib.Path, *, keep: int) -> None:
  """Removes all versions but the newest `keep`, and what was left unfinished.

  Whatever else is in the directory stays.
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
) -> dict[str, manifest.File]:
  """Writes this process's files of tensors, and the first one their index."""
  shapes = rules.shapes(model)
  layout = shards.layout(shapes, dtype=dtype, max_shard_bytes=max_shard_bytes)
  try:
    digests = shards.write_files(
      directory,
      layout,
      shapes,
      tensors.fetch,
      dtype=dtype,
      with_read_back=False,  # Servers check what they load.
      share=share,
      elsewhere=tensors.take_part,
    )
  except errors.CheckpointError as error:
    raise errors.DivergedError(
      "The policy's weights are not finite; they are not handed on.",
      where=error.where,
      why=error.why,
      fix="Lower the learning rate and go on from the last checkpoint.",
    ) from error
  if share.index == 0:
    shards.write_index(directory, layout, shapes, dtype)
  return {
    file: manifest.File(size=(directory / file).stat().st_size, digest=digest)
    for file, digest in digests.items()
  }


def _seal(
  directory: pathlib.Path,
  version: int,
  weights: dict[str, manifest.File],
  model: decoder.Model,
  dtype: Dtype,
) -> tuple[str, int]:
  """Writes the manifest of all that is there; gives its digest, and bytes."""
  texts = {
    file.name: manifest.describe(file) for file in directory.glob("*.json")
  }
  files = {**weights, **texts}
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
  """Waits until the list of a directory's files is on disk."""
  handle = os.open(directory, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)
