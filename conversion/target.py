# SPDX-License-Identifier: Apache-2.0
"""Directories that are there whole, or not at all.

What is written goes under a temporary name beside the target and is renamed
last: killed at any moment, nothing half-written is found under the final name.
"""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import re
import shutil
import socket

from atlas_jax import errors

_HOST = socket.gethostname()
_SPARE_BYTES = 64 * 2**20  # For the files besides the weights.


def check(
  directory: pathlib.Path,
  source: pathlib.Path,
  *,
  num_bytes: int,
  overwrite: bool,
) -> None:
  """Refuses a target that is in use, or too small a disk.

  What killed runs left beside the target does not count: it is removed.

  Raises:
    errors.ConfigError: if it is in use, unless it is to be replaced.
    errors.CheckpointError: if the weights do not fit.
  """
  if directory.resolve() == source.resolve():
    raise errors.ConfigError(
      "An export would replace the model it came from.",
      where=str(directory),
      why="Source and target are the same directory.",
      fix="Choose another target.",
    )
  clean(directory)
  used = directory.exists() and not (
    directory.is_dir() and not any(directory.iterdir())
  )
  if used and not (overwrite and directory.is_dir()):
    raise errors.ConfigError(
      "The target of the export is in use.",
      where=str(directory),
      why="It is not an empty directory.",
      fix="Remove it, or choose another target.",
    )
  free = free_bytes(directory)
  if num_bytes + _SPARE_BYTES > free:
    raise errors.CheckpointError(
      "The disk is too full for the export.",
      where=str(directory.parent),
      why=f"It takes {num_bytes:,} bytes and some spare; {free:,} are free.",
      fix="Make room, or choose a target on another disk.",
    )


def free_bytes(directory: pathlib.Path) -> int:
  """Tells how much the disk can take where `directory` is, or will be."""
  there = next(path for path in directory.absolute().parents if path.exists())
  return shutil.disk_usage(there).free


def clean(directory: pathlib.Path) -> None:
  """Removes what killed runs of this machine left beside a target.

  A target that was about to be replaced gets its name back.
  """
  directory = directory.absolute()
  name = re.escape(directory.name)
  ours = re.compile(rf"{name}\.(tmp|old)-{re.escape(_HOST)}-(\d+)")
  for path in sorted(directory.parent.glob(f"{directory.name}.*")):
    match = ours.fullmatch(path.name)
    if not match or _is_running(int(match[2])):
      continue
    if match[1] == "old" and not directory.exists():
      path.rename(directory)
    else:
      shutil.rmtree(path, ignore_errors=True)


def _beside(directory: pathlib.Path, kind: str) -> pathlib.Path:
  # On a shared disk, other machines may have a process of the same number.
  return directory.with_name(f"{directory.name}.{kind}-{_HOST}-{os.getpid()}")


def _is_running(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    return True
  return pid != os.getpid()  # What has our number was left by another.


@contextlib.contextmanager
def writing(directory: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a directory to write into, which then becomes `directory`.

  Raises:
    errors.CheckpointError: if the disk refuses.
  """
  directory = directory.absolute()
  clean(directory)
  partial = _beside(directory, "tmp")
  try:
    with disk_errors(directory):
      shutil.rmtree(partial, ignore_errors=True)
      partial.mkdir(parents=True)
      yield partial
      _sync(partial)
      _rename(partial, directory)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def disk_errors(directory: pathlib.Path) -> Iterator[None]:
  """Tells what a disk says against writing `directory`.

  Raises:
    errors.CheckpointError: in place of an `OSError`.
  """
  try:
    yield
  except OSError as error:
    raise errors.CheckpointError(
      "The model cannot be written.",
      where=str(directory),
      why=str(error),
      fix="Check the space and the permissions there; nothing was left behind.",
    ) from error


def _sync(directory: pathlib.Path) -> None:
  """Waits until every file, and every list of them, is on disk."""
  for path in (*directory.rglob("*"), directory):
    handle = os.open(path, os.O_RDONLY)
    try:
      os.fsync(handle)
    finally:
      os.close(handle)


def _rename(partial: pathlib.Path, directory: pathlib.Path) -> None:
  """Puts a complete directory under its final name."""
  if directory.exists() and any(directory.iterdir()):
    old = _beside(directory, "old")
    directory.rename(old)
    partial.rename(directory)
    shutil.rmtree(old)
  else:
    partial.rename(directory)
  handle = os.open(directory.parent, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)
