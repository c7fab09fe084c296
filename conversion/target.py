# SPDX-License-Identifier: Apache-2.0
"""Writes directories atomically: completely, or not at all.

Files are written under a temporary name beside the target, and the directory is
renamed last. A process killed at any moment leaves nothing incomplete under
the final name.
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
_SPARE_BYTES = 64 * 2**20  # For all files but the weights.


def check(
  directory: pathlib.Path,
  source: pathlib.Path,
  *,
  num_bytes: int,
  overwrite: bool,
) -> None:
  """Rejects a target that is in use or on too small a disk.

  Leftovers of killed runs beside the target are removed first.

  Raises:
    errors.ConfigError: if it is in use and must not be overwritten.
    errors.CheckpointError: if the weights do not fit.
  """
  if directory.resolve() == source.resolve():
    raise errors.ConfigError(
      "The target is the source model.",
      where=str(directory),
      why="The export would overwrite the model that it reads.",
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
      why=f"It needs {num_bytes + _SPARE_BYTES:,} bytes; {free:,} are free.",
      fix="Free space, or choose a target on another disk.",
    )


def free_bytes(directory: pathlib.Path) -> int:
  """Returns the free bytes of the disk on which `directory` is or will be."""
  there = next(path for path in directory.absolute().parents if path.exists())
  return shutil.disk_usage(there).free


def clean(directory: pathlib.Path) -> None:
  """Removes what killed runs of this machine left beside a target.

  A target that was being replaced gets its name back.
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
  # The host name is needed on a shared disk, as PIDs are per machine.
  return directory.with_name(f"{directory.name}.{kind}-{_HOST}-{os.getpid()}")


def _is_running(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    return True
  return pid != os.getpid()  # A previous process had our PID.


@contextlib.contextmanager
def writing(directory: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a private directory that is renamed to `directory` on success.

  Raises:
    errors.CheckpointError: if a file operation fails.
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
  """Converts an `OSError` while writing `directory`.

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
      fix="Check free space and permissions; partial files were removed.",
    ) from error


def _sync(directory: pathlib.Path) -> None:
  """Flushes all files and directories below `directory` to disk."""
  for path in (*directory.rglob("*"), directory):
    handle = os.open(path, os.O_RDONLY)
    try:
      os.fsync(handle)
    finally:
      os.close(handle)


def _rename(partial: pathlib.Path, directory: pathlib.Path) -> None:
  """Renames a complete directory to its final name."""
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
