# SPDX-License-Identifier: Apache-2.0
"""Training state on disk: saved by orbax, held to its digests by us.

Orbax restores a flipped bit without a word. So every step directory gets a
manifest of digests, written last, and a step without one, or that does not
match it, is not restored.
"""

from collections.abc import Mapping
import hashlib
import json
import math
import os
import pathlib
import shutil
from typing import Any, Literal, TypeVar

from absl import logging
import jax
import orbax.checkpoint as ocp

from atlas_jax import errors

Mode = Literal["min", "max"]
_State = TypeVar("_State")
STATE = "state"  # Where orbax writes, inside a step.
_ABOUT = "about.json"
_MANIFEST = "manifest.json"
_MAX_LISTED = 4


class Checkpointer:
  """Saves and restores the state of one run.

  `identity` says what the run depends on, such as a fingerprint of the data: a
  checkpoint made under another is refused.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    *,
    identity: dict[str, str],
    keep: int,
    best_metric: str,
    best_mode: Mode,
    load_best: bool,
  ) -> None:
    """Removes what a killed save left behind.

    Args:
      directory: holds one folder per step.
      identity: names and digests of what the run depends on.
      keep: how many of the newest steps stay on disk.
      best_metric: the step at which it was best stays too; empty for none.
      best_mode: whether the least or the greatest is the best.
      load_best: whether a run ends with that step, not with its last.

    Raises:
      errors.ConfigError: if none is to be kept, or the best is not defined.
    """
    if keep < 1:
      raise errors.ConfigError(
        f"{keep} checkpoints are to be kept.",
        where="--config.checkpoint.keep",
        why="Without one, a run that is stopped starts anew.",
        fix="Keep at least 1; with 2 a damaged one has another before it.",
      )
    if best_mode not in ("min", "max") or (load_best and not best_metric):
      raise errors.ConfigError(
        "It is not told which checkpoint is the best.",
        where="--config.checkpoint",
        why=f"best_metric={best_metric!r}, best_mode={best_mode!r}, "
        f"load_best={load_best}.",
        fix="Name a metric, such as eval/loss, and a mode, min or max.",
      )
    self._directory = directory.absolute()
    self._directory.mkdir(parents=True, exist_ok=True)
    self._identity = identity
    self._keep = keep
    self._best_metric = best_metric
    self._sign = 1 if best_mode == "max" else -1
    self._load_best = load_best
    self._orbax = ocp.StandardCheckpointer()
    for partial in self._directory.glob("*.tmp"):
      shutil.rmtree(partial)

  def save(
    self,
    step: int,
    state: Any,  # Any: a pytree of arrays.
    metrics: Mapping[str, float | jax.Array],
  ) -> None:
    """Saves a step: written aside, digested, then given its name.

    Args:
      step: its number.
      state: what `restore_latest` will give back.
      metrics: of an evaluation at this step, if there was one.
    """
    final = self._directory / str(step)
    partial = self._directory / f"{step}.tmp"
    write(partial, state, identity=self._identity, metrics=metrics)
    partial.rename(final)
    kept = {self.best_step(), *self.steps()[-self._keep :]}
    for old in self.steps():
      if old not in kept:
        shutil.rmtree(self._directory / str(old))
    logging.info("Saved step %d to %s.", step, final)

  def is_best(self, metrics: Mapping[str, float | jax.Array]) -> bool:
    """Tells whether an evaluation is better than that of any saved step.

    Raises:
      errors.ConfigError: if the evaluation lacks the metric it is judged by.
    """
    if not self._best_metric or not metrics:
      return False
    if self._best_metric not in metrics:
      raise errors.ConfigError(
        f"An evaluation has no {self._best_metric}.",
        where="--config.checkpoint.best_metric",
        why=f"It has {', '.join(sorted(metrics))}.",
        fix="Name one of these, or none to keep the newest steps alone.",
      )
    value = float(metrics[self._best_metric])
    best = max(self._evaluations().values(), default=-math.inf)
    return math.isfinite(value) and self._sign * value > best

  def best_step(self) -> int | None:
    """The step on disk whose evaluation was the best; None if none had one."""
    evaluations = self._evaluations()
    return max(evaluations, key=evaluations.__getitem__, default=None)

  def _evaluations(self) -> dict[int, float]:
    """What each step on disk is judged by, so that more is better."""
    found = {}
    for step in self.steps():
      about = _read_json(self._directory / str(step) / _ABOUT)
      if about and self._best_metric in about["metrics"]:
        found[step] = self._sign * about["metrics"][self._best_metric]
    return found

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
      about = _about_if_sound(path)
      if about is not None:
        self._check_identity(about["identity"], path)
        _check_arrays(about["arrays"], _arrays(state), path)
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

  def restore_final(self, state: _State) -> _State:
    """Gives the state to end with: the best if `load_best`, else `state`.

    Raises:
      errors.CheckpointError: if the best is damaged, or there is none.
    """
    if not self._load_best:
      return state
    step = self.best_step()
    path = self._directory / str(step)
    if step is None or _about_if_sound(path) is None:
      raise errors.CheckpointError(
        "The best checkpoint cannot be loaded.",
        where=str(self._directory),
        why=f"Step {step} does not match the digests written with it."
        if step
        else f"No step on disk was evaluated by {self._best_metric}.",
        fix="Set --config.checkpoint.load_best=False to end with the last.",
      )
    return self._restore(path, state)

  def _restore(self, path: pathlib.Path, state: _State) -> _State:
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      state,
    )
    restored = self._orbax.restore(path / STATE, abstract)
    logging.info("Restored %s.", path)
    return restored

  def _check_identity(self, saved: dict[str, str], path: pathlib.Path) -> None:
    changed = _changes(saved, self._identity)
    if changed:
      raise errors.CheckpointError(
        f"A checkpoint was made with another {' and '.join(changed)}.",
        where=str(path),
        why="; ".join(changed.values()),
        fix="Restore what changed, or choose another --workdir.",
      )


def write(
  directory: pathlib.Path,
  state: Any,  # Any: a pytree of arrays.
  *,
  identity: Mapping[str, str],
  metrics: Mapping[str, float | jax.Array],
) -> None:
  """Writes a step and, last, the digests of all that `directory` holds.

  Args:
    directory: not yet under its final name, since a write may be interrupted.
    state: the arrays.
    identity: see `Checkpointer`.
    metrics: of an evaluation at this step, if there was one.
  """
  with ocp.StandardCheckpointer() as orbax:
    orbax.save(directory / STATE, state)
  about = {
    "identity": dict(identity),
    "arrays": _arrays(state),
    "metrics": {k: float(v) for k, v in metrics.items() if math.isfinite(v)},
  }
  _write_json(directory / _ABOUT, about)
  _write_json(directory / _MANIFEST, _digests(directory))


def check(path: pathlib.Path) -> None:
  """Refuses a step of which a file is missing, or has changed.

  Raises:
    errors.CheckpointError: naming it.
  """
  if _about_if_sound(path) is None:
    raise errors.CheckpointError(
      "A checkpoint is damaged.",
      where=str(path),
      why="Its files do not match the digests written with them.",
      fix="Take another step, or restore the folder from a copy.",
    )


def _check_arrays(
  saved: dict[str, str], wanted: dict[str, str], path: pathlib.Path
) -> None:
  """Compares shapes here: orbax would cast, and leave out what is None."""
  changed = _changes(saved, wanted)
  if changed:
    listed = list(changed.values())[:_MAX_LISTED]
    raise errors.CheckpointError(
      "A checkpoint does not fit this model and optimizer.",
      where=str(path),
      why=f"{len(changed)} arrays differ: {'; '.join(listed)}"
      + (", and so on." if len(listed) < len(changed) else "."),
      fix="Run with the config it was made with (the workdir keeps earlier "
      "ones, as config.*.json), or choose another --workdir.",
    )


def _changes(saved: dict[str, str], wanted: dict[str, str]) -> dict[str, str]:
  """Tells for each name that differs what was and what is."""
  return {
    name: f"{name}: {saved.get(name)} then, {wanted.get(name)} now"
    for name in sorted(saved.keys() | wanted.keys())
    if saved.get(name) != wanted.get(name)
  }


def _arrays(state: Any) -> dict[str, str]:  # Any: a pytree of arrays.
  """Names every array of a state, with its type and shape."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): (
      f"{leaf.dtype}{list(leaf.shape)}"
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
  }


def _about_if_sound(path: pathlib.Path) -> dict[str, Any] | None:  # Any: JSON.
  """Reads what a step holds, unless a file differs from the manifest."""
  manifest = _read_json(path / _MANIFEST)
  if manifest is None or manifest != _digests(path):
    return None
  return _read_json(path / _ABOUT)


def _read_json(path: pathlib.Path) -> dict[str, Any] | None:  # Any: JSON.
  """Reads a file; None if it is not there, or torn."""
  try:
    return json.loads(path.read_text("utf-8"))
  except (OSError, ValueError):
    return None


def _put_aside(path: pathlib.Path) -> None:
  aside = path.with_name(f"{path.name}.damaged")
  if aside.exists():
    shutil.rmtree(aside)
  path.rename(aside)


def _write_json(path: pathlib.Path, value: Any) -> None:  # Any: JSON.
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
