# SPDX-License-Identifier: Apache-2.0
"""Saves and restores the training state of a run.

Step N is written to `N.tmp` while training continues, sealed with its digests,
and then renamed to `N`. Directories with other names are never restored.
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
_MAX_REASON = 300  # TensorStore's messages can be several pages long.
_NONE = -1
# Parts of the identity that may change between runs, with the field of the
# state that is then reset.
_MAY_CHANGE = {"data": "", "student": "", "optimizer": "opt_state"}
# The fields of the state that `restore_final` restores.
_FINAL = {"params", "step"}


class Checkpointer:
  """Saves and restores the state of one run.

  `identity` names what the run depends on, e.g. a fingerprint of the data.
  Checkpoints with another identity are rejected.

  As a context manager, it waits on exit for the save in progress.
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
    """Opens the directory and removes partial steps of killed saves.

    Args:
      directory: has one folder per step.
      identity: names and digests of what the run depends on.
      keep: number of newest steps to keep on disk.
      max_failed: number of consecutive failed saves that stops the run.
      allow_changed: parts of the identity that may change, comma-separated:
        "data", "student" or "optimizer". With another optimizer, its moments
        and schedule are reset.
      best_metric: the step with the best value is kept too; empty for none.
      best_mode: whether smaller or larger values are better.
      load_best: whether `restore_final` returns the best step, not the last.

    Raises:
      errors.ConfigError: if `keep` < 1, the best step is not defined, or the
        directory cannot be written.
    """
    check_settings(keep, best_metric, best_mode, load_best)
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
    # Scores of steps that are saved or being saved; larger is better.
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
        # Logged, not raised: it would hide the exception that stopped the run.
        step, future = self._saving
        if future.exception() is not None:
          logging.error("Failed to save checkpoint step=%d as well.", step)

  def save(
    self,
    step: int,
    state: Any,  # Any: a pytree of arrays.
    metrics: Mapping[str, float | jax.Array],
    host_state: HostState,
  ) -> None:
    """Starts to save a step, after waiting for the previous save.

    The arrays are copied before it returns, so the caller may donate them. A
    failed save is logged and does not stop the run; see `max_failed`.

    Args:
      step: number of the step.
      state: arrays that `restore_latest` returns.
      metrics: of an evaluation at this step; empty if there was none.
      host_state: JSON that `restore_latest` returns.

    Raises:
      errors.CheckpointError: if `max_failed` consecutive saves failed.
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
    """Checks, without waiting, whether the save in progress has failed.

    Raises:
      errors.CheckpointError: see `save`.
    """
    if self._saving is not None and self._saving[1].done():
      self._settle()

  def wait(self) -> None:
    """Waits for the save in progress.

    Raises:
      errors.CheckpointError: if the last save failed.
    """
    self._settle()
    if self._num_failed:
      raise errors.CheckpointError(
        "The last save of this run failed.",
        where=str(self._directory),
        why="See the error above. The newest step on disk is "
        f"{max(self.steps(), default='none')}.",
        fix="Free space or repair the disk, then run the same command again.",
      )

  def is_best(self, metrics: Mapping[str, float | jax.Array]) -> bool:
    """Returns whether an evaluation is better than that of every saved step.

    Raises:
      errors.ConfigError: if the evaluation lacks `best_metric`.
    """
    if not self._best_metric or not metrics:
      return False
    if self._best_metric not in metrics:
      raise errors.ConfigError(
        f"best_metric={self._best_metric} is not a metric of the evaluation.",
        where="--config.checkpoint.best_metric",
        why=f"The evaluation has {', '.join(sorted(metrics))}.",
        fix="Set it to one of these, or to '' to keep only the newest steps.",
      )
    value = float(metrics[self._best_metric])
    best = max(self._scores.values(), default=-math.inf)
    return math.isfinite(value) and self._sign * value > best

  def best_step(self) -> int | None:
    """Returns the best evaluated step on disk, or None."""
    scores = {s: self._scores[s] for s in self.steps() if s in self._scores}
    return max(scores, key=scores.__getitem__, default=None)

  def steps(self) -> list[int]:
    """Returns the steps on disk, oldest first."""
    names = (path.name for path in self._directory.glob("*"))
    return sorted(int(name) for name in names if name.isdecimal())

  def restore_latest(self, state: _State) -> tuple[_State, HostState]:
    """Restores the newest undamaged step; donates `state`.

    The arrays of `state` are deleted before the step is read, so that resuming
    needs no more memory than training. Damaged steps are skipped with a warning
    and renamed to `N.damaged`, so they do not count as kept and step N can be
    saved again.

    Args:
      state: a pytree with the shapes, dtypes and shardings to restore; donated
        if there are steps.

    Returns:
      The state and the host state; `state` itself and an empty dict if there
      are no steps.

    Raises:
      errors.CheckpointError: if all steps are damaged, or the newest has
        another identity or other shapes.
    """
    steps = self.steps()
    if not steps:
      return state, {}
    step = self._newest_sound(steps)
    about = None if step is None else checkpoint_format.read(self._path(step))
    if step is None or about is None:
      raise errors.CheckpointError(
        "All checkpoints of this run are damaged.",
        where=str(self._directory),
        why=f"Steps {steps} do not match the digests written with them.",
        fix="Restore the folder from a backup, or remove it to start over.",
      )
    path = self._path(step)
    changed = checkpoint_format.changes(about["identity"], self._identity)
    self._check_changed(changed, path)
    reset = {_MAY_CHANGE[name] for name in changed} - {""}
    _check_arrays(about["arrays"], checkpoint_format.arrays(state), path, reset)
    restored = self._restore(path, state, reset)
    if _is_primary():
      for damaged in steps[steps.index(step) + 1 :]:
        self._scores.pop(damaged, None)
        _rename_damaged(self._path(damaged))
    _log_resumed(step, about, checkpoint_format.environment(state))
    return restored, checkpoint_format.read_host_state(path)

  def restore_final(self, state: _State) -> _State:
    """Returns the final state: with the best parameters if `load_best`.

    Then only the fields `params` and `step` of `state` are replaced; their
    arrays are donated.

    Raises:
      errors.CheckpointError: if the best step is damaged or missing.
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
        fix="Set --config.checkpoint.load_best=False to use the last step.",
      )
    others = _fields(state)[0].keys() - _FINAL
    return self._restore(self._path(step), state, others)

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
    """Waits for orbax, seals and renames the step; runs in a thread."""
    self._orbax.wait_until_finished()
    if not _is_primary():
      return
    checkpoint_format.seal(self._partial(step), about, host_state)
    self._partial(step).rename(self._path(step))
    logging.info("Saved checkpoint step=%d path=%s", step, self._path(step))
    kept = {self.best_step(), *self.steps()[-self._keep :]}
    for old in self.steps():
      if old not in kept:
        # Renamed first: a kill cannot leave a step with missing files.
        self._path(old).rename(self._partial(old))
        shutil.rmtree(self._partial(old))

  def _settle(self) -> None:
    """Waits for the save in progress, and counts it if it failed."""
    if self._saving is None:
      return
    (step, future), self._saving = self._saving, None
    error = future.exception()
    if error is None:
      self._num_failed = 0
    else:
      self._fail(step, error)

  def _fail(self, step: int, error: BaseException) -> None:
    """Removes the partial step and logs the failure; raises after too many."""
    self._num_failed += 1
    self._scores.pop(step, None)
    partial = self._partial(step)
    written = sum(f.stat().st_size for f in partial.rglob("*") if f.is_file())
    free = shutil.disk_usage(_existing(partial)).free
    shutil.rmtree(partial, ignore_errors=True)
    reason = str(error).partition("\n")[0][:_MAX_REASON]
    newest = max(self.steps(), default="none")
    logging.error(
      "FAILED TO SAVE CHECKPOINT step=%d failures=%d max_failed=%d: %s. "
      "%.2f GB of it had been written, with %.2f GB free. The newest step on "
      "disk is %s. Training continues; the next save tries again.",
      step,
      self._num_failed,
      self._max_failed,
      reason,
      written / 1e9,
      free / 1e9,
      newest,
    )
    if self._num_failed >= self._max_failed:
      raise errors.CheckpointError(
        f"{self._num_failed} saves in a row failed.",
        where=str(self._directory),
        why=f"{type(error).__name__}: {reason}. The newest step on disk is "
        f"{newest}.",
        fix="Free space or repair the disk, or keep fewer steps with "
        "--config.checkpoint.keep; then run the same command again.",
      ) from error

  def _newest_sound(self, steps: list[int]) -> int | None:
    """Returns the newest undamaged step; process 0 reads and broadcasts it."""
    found = _NONE
    for step in reversed(steps) if _is_primary() else ():
      why = checkpoint_format.damage(self._path(step))
      if not why:
        found = step
        break
      logging.warning(
        "Skipping damaged checkpoint path=%s: %s", self._path(step), why
      )
    if jax.process_count() > 1:
      found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
    return None if found == _NONE else found

  def _restore(
    self, path: pathlib.Path, state: _State, reset: Collection[str]
  ) -> _State:
    """Restores all fields of a state except `reset`; donates the others."""
    named, structure = _fields(state)
    replaced = {k: field for k, field in named.items() if k not in reset}
    wanted = jax.tree.map(_abstract, replaced)
    for leaf in jax.tree.leaves(replaced):
      if isinstance(leaf, jax.Array):
        leaf.delete()
    restored = ocp.PyTreeCheckpointer().restore(
      path / checkpoint_format.STATE,
      args=ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=bool(reset),
      ),
    )
    return jax.tree.unflatten(structure, {**named, **restored}.values())

  def _check_changed(
    self, changed: Mapping[str, tuple[str, str]], path: pathlib.Path
  ) -> None:
    if not changed.keys() <= self._allowed:
      fix = "Revert the change, or choose another --workdir"
      if changed.keys() <= _MAY_CHANGE.keys():
        names = ",".join(changed)
        fix += f"; or allow it: --config.checkpoint.allow_changed={names}"
      raise errors.CheckpointError(
        f"The checkpoint was saved with another {' and '.join(changed)}.",
        where=str(path),
        why=checkpoint_format.table(changed),
        fix=f"{fix}.",
      )
    if changed:
      logging.warning(
        "Resuming with a changed identity:%s", checkpoint_format.table(changed)
      )


def _parse_allowed(allow_changed: str) -> set[str]:
  allowed = {name.strip() for name in allow_changed.split(",")} - {""}
  if not allowed <= _MAY_CHANGE.keys():
    raise errors.ConfigError(
      f"allow_changed must list only {', '.join(_MAY_CHANGE)}, got "
      f"{allow_changed!r}.",
      where=f"--config.checkpoint.allow_changed={allow_changed}",
      why="A run cannot resume if anything else changed.",
      fix="List some of these, separated by commas, or choose a new --workdir.",
    )
  return allowed


def check_settings(
  keep: int, best_metric: str, best_mode: Mode, load_best: bool
) -> None:
  """Validates arguments of `Checkpointer`.

  Raises:
    errors.ConfigError: if `keep` < 1 or the best step is not defined.
  """
  if keep < 1:
    raise errors.ConfigError(
      f"keep must be >= 1, got {keep}.",
      where="--config.checkpoint.keep",
      why="Without a checkpoint, a stopped run cannot resume.",
      fix="Set it to 1, or to 2 to have a spare if the newest is damaged.",
    )
  if best_mode not in ("min", "max") or (load_best and not best_metric):
    raise errors.ConfigError(
      "best_mode must be min or max, and load_best requires best_metric.",
      where="--config.checkpoint",
      why=f"Got best_metric={best_metric!r}, best_mode={best_mode!r}, "
      f"load_best={load_best}.",
      fix="Set best_metric, e.g. to eval/loss, and best_mode to min or max.",
    )


def _prepare(directory: pathlib.Path) -> None:
  """Creates the directory, checks write access and removes partial steps."""
  try:
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / "probe.tmp"
    probe.mkdir(exist_ok=True)
    for partial in directory.glob("*.tmp"):
      if partial != probe:
        logging.info("Removing partial checkpoint path=%s", partial)
      shutil.rmtree(partial)
  except OSError as error:
    raise errors.ConfigError(
      "The checkpoint directory is not writable.",
      where=str(directory),
      why=str(error),
      fix="Choose a writable --workdir.",
    ) from error


def _check_arrays(
  saved: Mapping[str, str],
  wanted: Mapping[str, str],
  path: pathlib.Path,
  reset: Collection[str],
) -> None:
  """Compares dtypes and shapes: orbax would cast arrays and skip None."""
  changed = {
    name: values
    for name, values in checkpoint_format.changes(saved, wanted).items()
    if name.partition("/")[0] not in reset
  }
  if changed:
    raise errors.CheckpointError(
      "The checkpoint does not match this model and optimizer.",
      where=str(path),
      why=f"{len(changed)} arrays differ:{checkpoint_format.table(changed)}",
      fix="Use the config of the checkpoint (the workdir keeps earlier ones as "
      "config.*.json), or choose another --workdir.",
    )


def _log_resumed(
  step: int,
  about: Mapping[str, Any],  # Any: JSON.
  environment: Mapping[str, str],
) -> None:
  minutes = (time.time() - about["saved_at"]) / 60
  logging.info("Resuming from step=%d, saved %.0f minutes ago", step, minutes)
  changed = checkpoint_format.changes(about["environment"], environment)
  if changed:
    logging.warning(
      "The environment differs from that of the checkpoint; results may not "
      "match bit for bit:%s",
      checkpoint_format.table(changed),
    )


def _rename_damaged(path: pathlib.Path) -> None:
  damaged = path.with_name(f"{path.name}.damaged")
  if damaged.exists():
    shutil.rmtree(damaged)
  path.rename(damaged)


def _fields(state: Any) -> tuple[dict[str, Any], Any]:  # Any: a pytree.
  """Returns the fields of a state by name, and the structure they form."""
  fields, structure = jax.tree.flatten_with_path(
    state, is_leaf=lambda node: node is not state
  )
  return {
    checkpoint_format.name(key): field for key, field in fields
  }, structure


def _abstract(leaf: Any) -> Any:  # Any: an array, or a number.
  """Returns the shape, dtype and sharding of an array."""
  if not isinstance(leaf, jax.Array):
    return leaf
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _existing(path: pathlib.Path) -> pathlib.Path:
  return next(p for p in (path, *path.parents) if p.exists())


def _is_primary() -> bool:
  """Returns whether this process writes files; all processes write arrays."""
  return jax.process_index() == 0
