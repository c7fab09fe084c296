# SPDX-License-Identifier: Apache-2.0
"""One saved step: a directory of arrays, what they belong to, and digests.

  state/           the arrays, by orbax
  about.json       identity, environment, shapes, metrics of an evaluation
  host_state.json  what a recipe keeps beside the arrays
  manifest.json    a digest of every file, written last

Orbax restores a flipped bit without a word. So a directory without a manifest,
or that does not match it, is not restored.
"""

from collections.abc import Mapping, Sequence
from concurrent import futures
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import time
from typing import Any

import jax
import orbax.checkpoint as ocp

from atlas_jax import errors

STATE = "state"  # Where orbax writes.
_ABOUT = "about.json"
_HOST_STATE = "host_state.json"
_MANIFEST = "manifest.json"
_FORMAT = 2
_MAX_LISTED = 8
_MAX_DIGEST = 12
_NOTHING = "none"


def write(
  directory: pathlib.Path,
  state: Any,  # Any: a pytree of arrays.
  *,
  identity: Mapping[str, str],
) -> None:
  """Writes a step, and waits for it.

  Args:
    directory: not yet under its final name, since a write may be interrupted.
    state: the arrays.
    identity: see `checkpoint.Checkpointer`.
  """
  with ocp.StandardCheckpointer() as orbax:
    orbax.save(directory / STATE, state)
  seal(directory, describe(state, identity=identity, metrics={}), {})


def describe(
  state: Any,  # Any: a pytree of arrays.
  *,
  identity: Mapping[str, str],
  metrics: Mapping[str, float | jax.Array],
) -> dict[str, Any]:  # Any: JSON.
  """Gives what `seal` writes of a state, without writing it."""
  return {
    "format": _FORMAT,
    "saved_at": time.time(),
    "identity": dict(identity),
    "environment": environment(state),
    "arrays": arrays(state),
    "metrics": {k: float(v) for k, v in metrics.items() if math.isfinite(v)},
  }


def seal(
  directory: pathlib.Path,
  about: Mapping[str, Any],  # Any: JSON, as `describe` gives it.
  host_state: Mapping[str, Any],  # Any: JSON.
) -> None:
  """Writes what is no array and, last, the digests of all files."""
  _write_json(directory / _ABOUT, about)
  _write_json(directory / _HOST_STATE, host_state)
  _write_json(directory / _MANIFEST, _digests(directory))


def damage(path: pathlib.Path) -> str:
  """Tells which files of a step are not what was written; "" if all are."""
  manifest = _read_manifest(path)
  if manifest is None:
    return f"{_MANIFEST}, which is written last, is missing or torn"
  changed = changes(manifest, _digests(path))
  told = [
    f"{name} is missing"
    if now == _NOTHING
    else f"{name} has SHA-256 {now[:_MAX_DIGEST]}, not {was[:_MAX_DIGEST]}"
    for name, (was, now) in changed.items()
  ]
  more = f"; and {len(told) - _MAX_LISTED} more" * (len(told) > _MAX_LISTED)
  return "; ".join(told[:_MAX_LISTED]) + more


def read(path: pathlib.Path) -> dict[str, Any] | None:  # Any: JSON.
  """Reads what a step holds; None if that is damaged. Arrays may be, too.

  Raises:
    errors.CheckpointError: if it was written in another format.
  """
  manifest, about = _read_manifest(path), _read_json(path / _ABOUT)
  if manifest is None or about is None:
    return None
  if manifest.get(_ABOUT) != _digest(path / _ABOUT):
    return None
  if about.get("format") != _FORMAT:
    raise errors.CheckpointError(
      "A checkpoint was made by another release.",
      where=str(path),
      why=f"Its format is {about.get('format')}, and this is {_FORMAT}.",
      fix="Finish the run with the release it began with, or export there and "
      "begin a new run with --config.model.path.",
    )
  return about


def read_host_state(path: pathlib.Path) -> dict[str, Any]:  # Any: JSON.
  """Reads what a recipe kept beside the arrays of a sound step."""
  return json.loads((path / _HOST_STATE).read_text("utf-8"))


def check(path: pathlib.Path) -> None:
  """Refuses a step of which a file is missing, or has changed.

  Raises:
    errors.CheckpointError: naming it.
  """
  if why := damage(path):
    raise errors.CheckpointError(
      "A checkpoint is damaged.",
      where=str(path),
      why=f"{why}.",
      fix="Take another step, or restore the folder from a copy.",
    )


def arrays(state: Any) -> dict[str, str]:  # Any: a pytree of arrays.
  """Names every array of a state, with its type and shape."""
  return {
    name(path): f"{leaf.dtype}{list(leaf.shape)}"
    for path, leaf in jax.tree.leaves_with_path(state)
  }


def name(path: Sequence[Any]) -> str:  # Any: JAX's kinds of keys.
  """Joins the keys of a path into a name."""
  return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def environment(state: Any) -> dict[str, str]:  # Any: a pytree of arrays.
  """Tells what the bits of a run depend on, besides its identity."""
  meshes = (
    leaf.sharding.mesh.shape
    for leaf in jax.tree.leaves(state)
    if isinstance(leaf.sharding, jax.sharding.NamedSharding)
  )
  mesh = next(meshes, {})
  return {
    "jax": jax.__version__,
    "jaxlib": importlib.metadata.version("jaxlib"),
    "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "processes": str(jax.process_count()),
    "mesh": " ".join(f"{axis}={size}" for axis, size in mesh.items()),
  }


def changes(
  saved: Mapping[str, str], wanted: Mapping[str, str]
) -> dict[str, tuple[str, str]]:
  """Gives what was and what is, for each name at which they differ."""
  return {
    name: (saved.get(name, _NOTHING), wanted.get(name, _NOTHING))
    for name in sorted(saved.keys() | wanted.keys())
    if saved.get(name) != wanted.get(name)
  }


def table(changed: Mapping[str, tuple[str, str]]) -> str:
  """Lays `changes` out to be read; many are cut short."""
  rows = [("", "then", "now")]
  rows += [(name, *values) for name, values in changed.items()][:_MAX_LISTED]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))
    for row in rows
  ]
  if len(changed) > _MAX_LISTED:
    lines.append(f"and {len(changed) - _MAX_LISTED} more")
  return "".join(f"\n    {line.rstrip()}" for line in lines)


def _read_json(path: pathlib.Path) -> dict[str, Any] | None:  # Any: JSON.
  """Reads a file; None if it is not there, or torn."""
  try:
    return json.loads(path.read_text("utf-8"))
  except (OSError, ValueError):
    return None


def _read_manifest(path: pathlib.Path) -> dict[str, str] | None:
  """Reads the digests of a step; None if it has none that can be read."""
  manifest = _read_json(path / _MANIFEST)
  is_whole = isinstance(manifest, dict) and _ABOUT in manifest
  return manifest if is_whole else None


def _write_json(path: pathlib.Path, value: Any) -> None:  # Any: JSON.
  with path.open("w", encoding="utf-8") as file:
    json.dump(value, file)
    file.flush()
    os.fsync(file.fileno())


def _digests(directory: pathlib.Path) -> dict[str, str]:
  """SHA-256 of every file, by its path inside the directory."""
  paths = [
    path
    for path in sorted(directory.rglob("*"))
    if path.is_file() and path.name != _MANIFEST
  ]
  names = [path.relative_to(directory).as_posix() for path in paths]
  with futures.ThreadPoolExecutor() as threads:  # Hashing holds no lock.
    return dict(zip(names, threads.map(_digest, paths), strict=True))


def _digest(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
