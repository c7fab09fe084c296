# SPDX-License-Identifier: Apache-2.0
"""The on-disk format of one saved step.

  state/           arrays, written by orbax
  about.json       identity, environment, shapes, metrics of an evaluation
  host_state.json  the recipe's state outside of the arrays
  manifest.json    a digest of every file, written last

Orbax does not detect flipped bits. So a directory is restored only if all its
files match the manifest.
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

STATE = "state"  # Folder that orbax writes.
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
  """Writes a step and waits until it is on disk.

  Args:
    directory: a temporary name, to be renamed by the caller once complete.
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
  """Returns the contents of about.json for `seal`."""
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
  about: Mapping[str, Any],  # Any: JSON, from `describe`.
  host_state: Mapping[str, Any],  # Any: JSON.
) -> None:
  """Writes the JSON files and, last, the digests of all files."""
  _write_json(directory / _ABOUT, about)
  _write_json(directory / _HOST_STATE, host_state)
  _write_json(directory / _MANIFEST, _digests(directory))


def damage(path: pathlib.Path) -> str:
  """Describes the missing or changed files of a step; "" if it is undamaged."""
  manifest = _read_manifest(path)
  if manifest is None:
    return f"{_MANIFEST} is missing or incomplete"
  changed = changes(manifest, _digests(path))
  damaged = [
    f"{name} is missing"
    if now == _NOTHING
    else f"{name} has SHA-256 {now[:_MAX_DIGEST]}, not {was[:_MAX_DIGEST]}"
    for name, (was, now) in changed.items()
  ]
  num_more = len(damaged) - _MAX_LISTED
  more = f"; and {num_more} more" if num_more > 0 else ""
  return "; ".join(damaged[:_MAX_LISTED]) + more


def read(path: pathlib.Path) -> dict[str, Any] | None:  # Any: JSON.
  """Reads about.json; None if it is damaged. Does not check other files.

  Raises:
    errors.CheckpointError: if the step has another format.
  """
  manifest, about = _read_manifest(path), _read_json(path / _ABOUT)
  if manifest is None or about is None:
    return None
  if manifest.get(_ABOUT) != _digest(path / _ABOUT):
    return None
  if about.get("format") != _FORMAT:
    raise errors.CheckpointError(
      "The checkpoint was saved by another release.",
      where=str(path),
      why=f"Its format is {about.get('format')}; this release reads format "
      f"{_FORMAT}.",
      fix="Finish the run with the release that started it, or export there "
      "and start a new run with --config.model.path.",
    )
  return about


def read_host_state(path: pathlib.Path) -> dict[str, Any]:  # Any: JSON.
  """Reads the host state of an undamaged step."""
  return json.loads((path / _HOST_STATE).read_text("utf-8"))


def check(path: pathlib.Path) -> None:
  """Validates that no file of a step is missing or changed.

  Raises:
    errors.CheckpointError: with the names of the damaged files.
  """
  if why := damage(path):
    raise errors.CheckpointError(
      "The checkpoint is damaged.",
      where=str(path),
      why=f"{why}.",
      fix="Use another step, or restore the folder from a backup.",
    )


def arrays(state: Any) -> dict[str, str]:  # Any: a pytree of arrays.
  """Returns the dtype and shape of every array of a state, by name."""
  return {
    name(path): f"{leaf.dtype}{list(leaf.shape)}"
    for path, leaf in jax.tree.leaves_with_path(state)
  }


def name(path: Sequence[Any]) -> str:  # Any: JAX's kinds of keys.
  """Joins the keys of a pytree path with slashes."""
  return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def environment(state: Any) -> dict[str, str]:  # Any: a pytree of arrays.
  """Returns versions, devices and mesh, which affect results bit for bit."""
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
  """Returns (saved, wanted) for each name whose values differ."""
  return {
    name: (saved.get(name, _NOTHING), wanted.get(name, _NOTHING))
    for name in sorted(saved.keys() | wanted.keys())
    if saved.get(name) != wanted.get(name)
  }


def table(changed: Mapping[str, tuple[str, str]]) -> str:
  """Formats `changes` as a table of at most `_MAX_LISTED` rows."""
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
  """Reads a JSON file; None if it is missing or invalid."""
  try:
    return json.loads(path.read_text("utf-8"))
  except (OSError, ValueError):
    return None


def _read_manifest(path: pathlib.Path) -> dict[str, str] | None:
  """Reads the digests of a step; None if they are missing or invalid."""
  manifest = _read_json(path / _MANIFEST)
  is_whole = isinstance(manifest, dict) and _ABOUT in manifest
  return manifest if is_whole else None


def _write_json(path: pathlib.Path, value: Any) -> None:  # Any: JSON.
  with path.open("w", encoding="utf-8") as file:
    json.dump(value, file)
    file.flush()
    os.fsync(file.fileno())


def _digests(directory: pathlib.Path) -> dict[str, str]:
  """Returns the SHA-256 of every file, by its path in the directory."""
  paths = [
    path
    for path in sorted(directory.rglob("*"))
    if path.is_file() and path.name != _MANIFEST
  ]
  names = [path.relative_to(directory).as_posix() for path in paths]
  with futures.ThreadPoolExecutor() as threads:  # Hashing releases the GIL.
    return dict(zip(names, threads.map(_digest, paths), strict=True))


def _digest(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
