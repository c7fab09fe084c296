# SPDX-License-Identifier: Apache-2.0
"""Training state on disk: saved by orbax, held to its digests by us.

Orbax restores a flipped bit without a word. So every step directory gets a
manifest of digests, written last, and a step without one, or that does not
match it, is not restored.
"""

import hashlib
import json
import os
import pathlib
import shutil
from typing import Any, TypeVar

from absl import logging
import jax
import orbax.checkpoint as ocp

from atlas_jax import errors

_State = TypeVar("_State")
_IDENTITY = "identity.json"
_MANIFEST = "manifest.json"


class Checkpointer:
  """Saves and restores the state of one run.

  `identity` says what the run depends on, such as a fingerprint of the data: a
  checkpoint made under another is refused.
  """

  def __init__(
    self, directory: pathlib.Path, *, identity: dict[str, str], keep: int
  ) -> None:
    """Removes what a killed save left behind.

    Args:
      directory: holds one folder per step.
      identity: names and digests of what the run depends on.
      keep: how many of the newest steps stay on disk.

    Raises:
      errors.ConfigError: if none is to be kept.
    """
    if keep < 1:
      raise errors.ConfigError(
        f"{keep} checkpoints are to be kept.",
        where="--config.checkpoint.keep",
        why="Without one, a run that is stopped starts anew.",
        fix="Keep at least 1; with 2 a damaged one has another before it.",
      )
    self._directory = directory.absolute()
    self._directory.mkdir(parents=True, exist_ok=True)
    self._identity = identity
    self._keep = keep
    self._orbax = ocp.StandardCheckpointer()
    for partial in self._directory.glob("*.tmp"):
      shutil.rmtree(partial)

  def save(self, step: int, state: Any) -> None:  # Any: a pytree of arrays.
    """Saves a step: written aside, digested, then given its name."""
    final = self._directory / str(step)
    partial = self._directory / f"{step}.tmp"
    self._orbax.save(partial / "state", state)
    self._orbax.wait_until_finished()
    _write_json(partial / _IDENTITY, self._identity)
    _write_json(partial / _MANIFEST, _digests(partial))
    partial.rename(final)
    for old in self.steps()[: -self._keep]:
      shutil.rmtree(self._directory / str(old))
    logging.info("Saved step %d to %s.", step, final)

  def steps(self) -> list[int]:
    """Steps on disk, oldest first."""
    names = (path.name for path in self._directory.iterdir())
    return sorted(int(name) for name in names if name.isdecimal())

  def restore_latest(self, state: _State) -> _State:
    """Restores the newest sound step into the shape of `state`.

    A damaged step is put aside, with a warning, for the one before it; so it
    neither counts as kept nor is in the way when its step is saved again.

    Args:
      state: a pytree with the shapes, dtypes and shardings wanted. Returned as
        it is if nothing was saved yet.

    Raises:
      errors.CheckpointError: if there are steps but none is sound, or the
        newest was made by a run of another identity or shape.
    """
    steps = self.steps()
    damaged = []
    for step in reversed(steps):
      path = self._directory / str(step)
      identity = _identity_if_sound(path)
      if identity is not None:
        self._check_identity(identity, path)
        restored = self._restore(path, state)
        for other in damaged:
          _put_aside(other)
        return restored
      logging.warning("Checkpoint %s is damaged; passed over.", path)
      damaged.append(path)
    if steps:
      raise errors.CheckpointError(
        "No checkpoint of this run is sound.",
        where=str(self._directory),
        why=f"Steps {steps} do not match the digests written with them.",
        fix="Restore the folder from a copy, or remove it to start anew.",
      )
    return state

  def _restore(self, path: pathlib.Path, state: _State) -> _State:
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      state,
    )
    try:
      restored = self._orbax.restore(path / "state", abstract)
    except (ValueError, KeyError, TypeError) as error:
      raise errors.CheckpointError(
        "A checkpoint does not fit this model and optimizer.",
        where=str(path),
        why=str(error).splitlines()[0][:300],
        fix="Run with the config it was made with (the workdir keeps earlier "
        "ones, as config.*.json), or choose another --workdir.",
      ) from error
    logging.info("Resumed from %s.", path)
    return restored

  def _check_identity(self, saved: dict[str, str], path: pathlib.Path) -> None:
    names = sorted(saved.keys() | self._identity.keys())
    changed = [n for n in names if saved.get(n) != self._identity.get(n)]
    if changed:
      raise errors.CheckpointError(
        f"A checkpoint was made with another {' and '.join(changed)}.",
        where=str(path),
        why="; ".join(
          f"{n}: {saved.get(n)} then, {self._identity.get(n)} now"
          for n in changed
        ),
        fix="Restore what changed, or choose another --workdir.",
      )


def _identity_if_sound(path: pathlib.Path) -> dict[str, str] | None:
  """Reads who made a step, unless a file differs from the manifest."""
  try:
    manifest = json.loads((path / _MANIFEST).read_text("utf-8"))
    if manifest != _digests(path):
      return None
    return json.loads((path / _IDENTITY).read_text("utf-8"))
  except (OSError, ValueError):
    return None


def _put_aside(path: pathlib.Path) -> None:
  aside = path.with_name(f"{path.name}.damaged")
  if aside.exists():
    shutil.rmtree(aside)
  path.rename(aside)


def _write_json(path: pathlib.Path, value: dict[str, str]) -> None:
  with path.open("w", encoding="utf-8") as file:
    json.dump(value, file)
    file.flush()
    os.fsync(file.fileno())


def _digests(directory: pathlib.Path) -> dict[str, str]:
  """SHA-256 of every file, by its path inside the directory."""
  digests = {}
  for path in sorted(directory.rglob("*")):
    if path.is_file() and path.name != _MANIFEST:
      with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
      digests[path.relative_to(directory).as_posix()] = digest
  return digests
