# SPDX-License-Identifier: Apache-2.0
"""Which steps of a run are on disk, and which of them it goes on from.

A step is written to `N.tmp` while training goes on, sealed with its digests,
and then given its name, `N`. What has another name is never restored.
"""

from collections.abc import Collection, Mapping
from concurrent import futures
import contextlib
import math
import pathlib
import shutil
import time
from typing import Any, Literal, Self, TypeVar

from absl import logging
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from atlas_jax import checkpoint_format, errors

Mode = Literal["min", "max"]
HostState = Mapping[str, Any]  # Any: JSON.
_State = TypeVar("_State")
_MAX_REASON = 300  # TensorStore tells pages.
_NONE = -1
# What a run may go on with although it has changed, and what of its state is
# then begun anew.
_MAY_CHANGE = {"data": "", "student": "", "optimizer": "opt_state"}


class Checkpointer:
  """Saves and restores the state of one run.

  `identity` says what the run depends on, such as a fingerprint of the data: a
  checkpoint made under another is refused.

  A context manager: its end waits for the save that is under way.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    *,
    identity: Mapping[str, str],
    keep: int,
    max_failed: int,
    allow_changed: str,
    best_metric: str,
    best_mode: Mode,
    load_best: bool,
  ) -> None:
    """Removes what a killed save left behind.

    Args:
      directory: holds one folder per step.
      identity: names and digests of what the run depends on.
      keep: how many of the newest steps stay on disk.
      max_failed: saves in a row that may fail before the run ends.
      allow_changed: parts of the identity that may have changed, separated by
        commas: "data", "student" or "optimizer". With another optimizer, its
        moments and schedule begin anew.
      best_metric: the step at which it was best stays too; empty for none.
      best_mode: whether the least or the greatest is the best.
      load_best: whether a run ends with that step, not with its last.

    Raises:
      errors.ConfigError: if none is to be kept, the best is not defined, or
        the directory cannot be written.
    """
    _check_settings(keep, best_metric, best_mode, load_best)
    self._allowed = _parse_allowed(allow_changed)
    self._directory = directory.absolute()
    self._identity = identity
    self._keep, self._max_failed = keep, max_failed
    self._best_metric = best_metric
    self._sign = 1 if best_mode == "max" else -1
    self._load_best = load_best
    self._orbax = ocp.StandardCheckpointer()
    self._executor = futures.ThreadPoolExecutor(1, "save")
    self._saving: tuple[int, futures.Future[None]] | None = None
    self._num_failed = 0
    if _is_primary():
      _prepare(self._directory)
    # Of every step that was saved or is being saved; more is better.
    self._scores: dict[int, float] = {}
    for step in self.steps():
      about = checkpoint_format.read(self._path(step))
      if about is not None:
        self._score(step, about["metrics"])

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
    with contextlib.closing(self._orbax), self._executor:
      if kind is None:
        self.wait()
      elif self._saving is not None:
        # What ended the run is told; this would hide it.
        step, future = self._saving
        if future.exception() is not None:
          logging.error("Step %d could not be saved either.", step)

  def save(
    self,
    step: int,
    state: Any,  # Any: a pytree of arrays.
    metrics: Mapping[str, float | jax.Array],
    host_state: HostState,
  ) -> None:
    """Begins to save a step, and waits for the one before it.

    The arrays are copied before it returns, so the caller may donate them. If
    the save fails that is told, the run goes on, and the next one tries again.

    Args:
      step: its number.
      state: what `restore_latest` will give back.
      metrics: of an evaluation at this step, if there was one.
      host_state: what else it will give back.

    Raises:
      errors.CheckpointError: if `max_failed` saves in a row have failed.
    """
    self._settle()
    about = checkpoint_format.describe(
      state, identity=self._identity, metrics=metrics
    )
    partial = self._partial(step)
    try:
      if _is_primary():
        partial.mkdir(parents=True)
      self._orbax.save(partial / checkpoint_format.STATE, state)
    except (OSError, ValueError) as error:
      self._fail(step, error)
      return
    self._score(step, about["metrics"])
    self._saving = (
      step,
      self._executor.submit(self._finish, step, about, host_state),
    )

  def poll(self) -> None:
    """Tells, without waiting, if the save under way has failed.

    Raises:
      errors.CheckpointError: as `save`.
    """
    if self._saving is not None and self._saving[1].done():
      self._settle()

  def wait(self) -> None:
    """Waits for the save under way.

    Raises:
      errors.CheckpointError: if the last save has failed.
    """
    self._settle()
    if self._num_failed:
      raise errors.CheckpointError(
        "The last save of this run failed.",
        where=str(self._directory),
        why="See the error above. The newest step on disk is "
        f"{max(self.steps(), default='none')}.",
        fix="Make room or mend the disk, then run the same command again.",
      )

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
    best = max(self._scores.values(), default=-math.inf)
    return math.isfinite(value) and self._sign * value > best

  def best_step(self) -> int | None:
    """The step on disk whose evaluation was the best; None if none had one."""
    scores = {s: self._scores[s] for s in self.steps() if s in self._scores}
    return max(scores, key=scores.__getitem__, default=None)

  def steps(self) -> list[int]:
    """Steps on disk, oldest first."""
    names = (path.name for path in self._directory.glob("*"))
    return sorted(int(name) for name in names if name.isdecimal())

  def restore_latest(self, state: _State) -> tuple[_State, HostState]:
    """Restores the newest sound step into the shape of `state`.

    A damaged step is put aside, with a warning, for the one before it; so it
    neither counts as kept nor is in the way when its step is saved again.

    Args:
      state: a pytree with the shapes, dtypes and shardings wanted.

    Returns:
      The state, and the host's; `state` as it is and an empty one if nothing
      was saved yet.

    Raises:
      errors.CheckpointError: if there are steps but none is sound, or the
        newest was made by a run of another identity or shape.
    """
    steps = self.steps()
    if not steps:
      return state, {}
    step = self._newest_sound(steps)
    about = None if step is None else checkpoint_format.read(self._path(step))
    if step is None or about is None:
      raise errors.CheckpointError(
        "No checkpoint of this run is sound.",
        where=str(self._directory),
        why=f"Steps {steps} do not match the digests written with them.",
        fix="Restore the folder from a copy, or remove it to start anew.",
      )
    path = self._path(step)
    changed = checkpoint_format.changes(about["identity"], self._identity)
    self._check_changed(changed, path)
    anew = {_MAY_CHANGE[name] for name in changed} - {""}
    _check_arrays(about["arrays"], checkpoint_format.arrays(state), path, anew)
    restored = self._restore(path, state, anew)
    if _is_primary():
      for damaged in steps[steps.index(step) + 1 :]:
        self._scores.pop(damaged, None)
        _put_aside(self._path(damaged))
    _tell_resumed(step, about, checkpoint_format.environment(state))
    return restored, checkpoint_format.read_host_state(path)

  def restore_final(self, state: _State) -> _State:
    """Gives the state to end with: the best if `load_best`, else `state`.

    Raises:
      errors.CheckpointError: if the best is damaged, or there is none.
    """
    if not self._load_best:
      return state
    best = self.best_step()
    step = self._newest_sound([] if best is None else [best])
    if step is None:
      raise errors.CheckpointError(
        "The best checkpoint cannot be loaded.",
        where=str(self._directory),
        why=f"No step on disk was evaluated by {self._best_metric}."
        if best is None
        else f"Step {best} does not match the digests written with it.",
        fix="Set --config.checkpoint.load_best=False to end with the last.",
      )
    return self._restore(self._path(step), state, set())

  def _path(self, step: int) -> pathlib.Path:
    return self._directory / str(step)

  def _partial(self, step: int) -> pathlib.Path:
    return self._directory / f"{step}.tmp"

  def _score(self, step: int, metrics: Mapping[str, float]) -> None:
    if self._best_metric in metrics:
      self._scores[step] = self._sign * metrics[self._best_metric]

  def _finish(
    self,
    step: int,
    about: Mapping[str, Any],  # Any: JSON.
    host_state: HostState,
  ) -> None:
    """Waits for orbax, seals the step and names it; runs in a thread."""
    self._orbax.wait_until_finished()
    if not _is_primary():
      return
    checkpoint_format.seal(self._partial(step), about, host_state)
    self._partial(step).rename(self._path(step))
    logging.info("Saved step %d to %s.", step, self._path(step))
    kept = {self.best_step(), *self.steps()[-self._keep :]}
    for old in self.steps():
      if old not in kept:
        # A kill half way leaves no step that lacks files.
        self._path(old).rename(self._partial(old))
        shutil.rmtree(self._partial(old))

  def _settle(self) -> None:
    """Waits for the save under way, and counts it if it failed."""
    if self._saving is None:
      return
    (step, future), self._saving = self._saving, None
    error = future.exception()
    if error is None:
      self._num_failed = 0
    else:
      self._fail(step, error)

  def _fail(self, step: int, error: BaseException) -> None:
    """Makes room, tells what happened, and gives up after too many."""
    self._num_failed += 1
    self._scores.pop(step, None)
    partial = self._partial(step)
    needed = sum(f.stat().st_size for f in partial.rglob("*") if f.is_file())
    free = shutil.disk_usage(_existing(partial)).free
    shutil.rmtree(partial, ignore_errors=True)
    reason = str(error).partition("\n")[0][:_MAX_REASON]
    newest = max(self.steps(), default="none")
    logging.error(
      "STEP %d WAS NOT SAVED, the %d. failure in a row (%d end the run): %s. "
      "%.2f GB of it had been written, and %.2f GB were free then. The newest "
      "step on disk is %s. Training goes on; the next save tries again.",
      *(step, self._num_failed, self._max_failed, reason),
      *(needed / 1e9, free / 1e9, newest),
    )
    if self._num_failed >= self._max_failed:
      raise errors.CheckpointError(
        f"{self._num_failed} saves in a row failed.",
        where=str(self._directory),
        why=f"{type(error).__name__}: {reason}. The newest step on disk is "
        f"{newest}.",
        fix="Make room or mend the disk, then run the same command again; "
        "--config.checkpoint.keep tells how many steps stay.",
      ) from error

  def _newest_sound(self, steps: list[int]) -> int | None:
    """Finds where to go on; one process reads, and tells the others."""
    found = _NONE
    for step in reversed(steps) if _is_primary() else ():
      why = checkpoint_format.damage(self._path(step))
      if not why:
        found = step
        break
      logging.warning(
        "Checkpoint %s is damaged, and passed over: %s.", self._path(step), why
      )
    if jax.process_count() > 1:
      found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
    return None if found == _NONE else found

  def _restore(
    self, path: pathlib.Path, state: _State, anew: Collection[str]
  ) -> _State:
    """Restores the fields of a state, but for those that begin anew."""
    fields, structure = jax.tree.flatten_with_path(
      state, is_leaf=lambda node: node is not state
    )
    named = {checkpoint_format.name(key): field for key, field in fields}
    wanted = {name: field for name, field in named.items() if name not in anew}
    restored = ocp.PyTreeCheckpointer().restore(
      path / checkpoint_format.STATE,
      args=ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=bool(anew),
      ),
    )
    return jax.tree.unflatten(structure, {**named, **restored}.values())

  def _check_changed(
    self, changed: Mapping[str, tuple[str, str]], path: pathlib.Path
  ) -> None:
    if not changed.keys() <= self._allowed:
      fix = "Restore what changed, or choose another --workdir"
      if changed.keys() <= _MAY_CHANGE.keys():
        names = ",".join(changed)
        fix += f"; or allow it: --config.checkpoint.allow_changed={names}"
      raise errors.CheckpointError(
        f"A checkpoint was made with another {' and '.join(changed)}.",
        where=str(path),
        why=checkpoint_format.table(changed),
        fix=f"{fix}.",
      )
    if changed:
      logging.warning(
        "Going on with what changed:%s", checkpoint_format.table(changed)
      )


def _parse_allowed(allow_changed: str) -> set[str]:
  allowed = {name.strip() for name in allow_changed.split(",")} - {""}
  if not allowed <= _MAY_CHANGE.keys():
    raise errors.ConfigError(
      "A run cannot go on with that changed.",
      where=f"--config.checkpoint.allow_changed={allow_changed}",
      why=f"What may change is {', '.join(_MAY_CHANGE)}.",
      fix="Name some of these, with commas between, or choose a new --workdir.",
    )
  return allowed


def _check_settings(
  keep: int, best_metric: str, best_mode: Mode, load_best: bool
) -> None:
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


def _prepare(directory: pathlib.Path) -> None:
  """Removes what killed saves left, and refuses what cannot be written."""
  try:
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / "probe.tmp"
    probe.mkdir(exist_ok=True)
    for partial in directory.glob("*.tmp"):
      if partial != probe:
        logging.info("Removing %s, which a killed save left.", partial)
      shutil.rmtree(partial)
  except OSError as error:
    raise errors.ConfigError(
      "Checkpoints cannot be written.",
      where=str(directory),
      why=str(error),
      fix="Choose a --workdir that you may write to.",
    ) from error


def _check_arrays(
  saved: Mapping[str, str],
  wanted: Mapping[str, str],
  path: pathlib.Path,
  anew: Collection[str],
) -> None:
  """Compares shapes here: orbax would cast, and leave out what is None."""
  changed = {
    name: values
    for name, values in checkpoint_format.changes(saved, wanted).items()
    if name.partition("/")[0] not in anew
  }
  if changed:
    raise errors.CheckpointError(
      "A checkpoint does not fit this model and optimizer.",
      where=str(path),
      why=f"{len(changed)} arrays differ:{checkpoint_format.table(changed)}",
      fix="Run with the config it was made with (the workdir keeps earlier "
      "ones, as config.*.json), or choose another --workdir.",
    )


def _tell_resumed(
  step: int,
  about: Mapping[str, Any],  # Any: JSON.
  environment: Mapping[str, str],
) -> None:
  minutes = (time.time() - about["saved_at"]) / 60
  logging.info("Resuming from step %d, saved %.0f minutes ago.", step, minutes)
  changed = checkpoint_format.changes(about["environment"], environment)
  if changed:
    logging.warning(
      "This is not where the checkpoint was made, so results may differ in "
      "their last bits:%s",
      checkpoint_format.table(changed),
    )


def _put_aside(path: pathlib.Path) -> None:
  aside = path.with_name(f"{path.name}.damaged")
  if aside.exists():
    shutil.rmtree(aside)
  path.rename(aside)


def _existing(path: pathlib.Path) -> pathlib.Path:
  return next(p for p in (path, *path.parents) if p.exists())


def _is_primary() -> bool:
  """Files are the business of one process, arrays that of all."""
  return jax.process_index() == 0
