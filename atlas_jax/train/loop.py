# SPDX-License-Identifier: Apache-2.0
"""The training loop of every recipe: steps, logs, evaluation, checkpoints.

The loop knows no algorithm. A recipe passes it a `Task`: what one step does.
Everywhere, `step` counts completed steps: `do_step(state, step)` performs step
number `step + 1`, whose metrics are logged and saved under `step + 1`.
"""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import math
import pathlib

import jax

from atlas_jax import checkpoint, errors, types
from atlas_jax.models import decoder
from atlas_jax.train import optimizer_step, train_state
from atlas_jax.train.guards import nonfinite, watchdog
from atlas_jax.train.telemetry import clock as train_clock
from atlas_jax.train.telemetry import memory, profile
from atlas_jax.train.telemetry import speed as train_speed
from atlas_jax.train.telemetry import writer as train_writer

Metrics = Mapping[str, float | jax.Array]
Evaluate = Callable[[train_state.TrainState, int], Metrics]


@dataclasses.dataclass(frozen=True)
class Task:
  """The part of a training loop that a recipe defines.

  Attributes:
    do_step: performs one step, given the number of completed steps. Its metrics
      are combined over the steps between two logs, by their mean or, if they
      are maxima, by their maximum. It need not wait for the devices.
    evaluate: metrics on held-out data, given the number of completed steps.
    rate: the learning rate of the next step, given the number of completed
      steps.
    row_ids: the ids of the data rows that the next step uses, given the number
      of completed steps.
    clock: splits the time of a step into phases; `do_step` may add phases.
    get_host_state: JSON state, besides the arrays, that resuming needs.
    set_host_state: restores that state before the first step.
  """

  do_step: Callable[
    [train_state.TrainState, int], tuple[train_state.TrainState, Metrics]
  ]
  evaluate: Evaluate
  rate: Callable[[int], float | jax.Array]
  row_ids: nonfinite.RowIds
  clock: train_clock.Clock
  get_host_state: Callable[[], checkpoint.HostState] = dict
  set_host_state: Callable[[checkpoint.HostState], None] = lambda _: None


@dataclasses.dataclass(frozen=True)
class Run:
  """Where a training run writes, and what it calls.

  Attributes:
    workdir: holds the checkpoints, in `checkpoints/`.
    writer: receives the metrics; the loop closes it.
    on_save: called after each checkpoint with the trained parameters and the
      number of completed steps.
    should_stop: called after each step; True saves the state and stops.
  """

  workdir: pathlib.Path
  writer: train_writer.Writer
  on_save: Callable[[decoder.Params, int], None] = lambda *_: None
  should_stop: Callable[[], bool] = lambda: False


@dataclasses.dataclass(frozen=True)
class Settings:
  """The config section `loop`.

  Attributes:
    num_steps: total number of steps, including those before a resume.
    log_every: steps between lines of metrics; a line also precedes each
      checkpoint.
    eval_every: steps between evaluations; 0 evaluates at the end only.
    save_every: steps between checkpoints. The last step and every evaluation
      that is the best so far are saved too.
    max_nonfinite: consecutive updates that may be skipped as non-finite.
    profile_steps: steps to trace, such as "3:5"; "" traces none.
    watchdog_s: seconds that a step, with its evaluation and save, may take
      before the process exits as hung; 0.0 disables the watchdog.
    require_updates: whether a run without any update fails after its export.
  """

  num_steps: int
  log_every: int
  eval_every: int
  save_every: int
  max_nonfinite: int
  profile_steps: str
  watchdog_s: float
  require_updates: bool

  def __post_init__(self) -> None:
    """Validates intervals and profile_steps."""
    for name in ("num_steps", "log_every", "save_every"):
      if getattr(self, name) < 1:
        raise errors.ConfigError(
          f"{name} must be at least 1, got {getattr(self, name)}.",
          where=f"--config.loop.{name}",
          why="It counts steps.",
          fix="Set it to 1 or more.",
        )
    profile.parse(self.profile_steps, self.num_steps)
    if self.watchdog_s < 0.0:
      raise errors.ConfigError(
        f"watchdog_s must not be negative, got {self.watchdog_s}.",
        where="--config.loop.watchdog_s",
        why="It is the number of seconds that a step may take.",
        fix="Set it well above the slowest step, or to 0 to disable it.",
      )


def train(
  state: train_state.TrainState,
  task: Task,
  config: types.Config,
  run: Run,
  *,
  num_steps: int,
  identity: Mapping[str, str],
) -> train_state.TrainState:
  """Trains until all steps are done and returns the final state.

  Args:
    state: initial state; replaced by the newest checkpoint if one exists.
    task: what the recipe does at each step.
    config: sections `loop` and `checkpoint`.
    run: where metrics and checkpoints go.
    num_steps: total number of steps; replaces that of `loop`.
    identity: see `checkpoint.Checkpointer`; a checkpoint of another identity is
      rejected.

  Returns:
    The final state, or the best one with `checkpoint.load_best`.

  Raises:
    errors.PreemptedError: after saving, if `run.should_stop` returned True.
    errors.DivergedError: after too many consecutive non-finite updates.
  """
  settings = Settings(**{**config.loop, "num_steps": num_steps})
  checkpointer = checkpoint.Checkpointer(
    run.workdir / "checkpoints", identity=identity, **config.checkpoint
  )
  state, host_state = checkpointer.restore_latest(state)
  if host_state:
    task.set_host_state(host_state)
  start, end = int(state.step), num_steps
  run.writer.begin(step=start, num_steps=end)
  watch = nonfinite.Watch(task.row_ids, run.workdir, settings.max_nonfinite)
  window: list[Metrics] = []
  clock = task.clock
  clock.on_phase = run.writer.phase
  with (
    contextlib.closing(run.writer),
    watchdog.Watchdog(settings.watchdog_s, checkpointer.steps) as dog,
    checkpointer,
    train_speed.Speed(clock) as speed,
    profile.Profile(
      profile.parse(settings.profile_steps, end), run.workdir
    ) as trace,
  ):
    for step in range(start, end):
      done = step + 1
      trace.before(done, state)
      state, metrics = task.do_step(state, step)
      state = state._replace(step=state.step + 1)
      window.append({**metrics, "learning_rate": task.rate(step)})
      with clock.phase("train"):
        watch.add(done, metrics)
      run.writer.advance(done, once_s=speed.once_s)
      if _is_due(done, settings.log_every, end):
        _log(done, window, run.writer, clock, speed)
      evaluated: Metrics = {}
      if _is_due(done, settings.eval_every, end):
        evaluated = _evaluate(state, done, task, run.writer)
      stopping = run.should_stop() and done < end
      is_best = checkpointer.is_best(evaluated)
      if stopping or is_best or _is_due(done, settings.save_every, end):
        # A resumed run has no metrics of the steps before the checkpoint.
        _log(done, window, run.writer, clock, speed)
        with clock.phase("save"):
          watch.settle()
          checkpointer.save(done, state, evaluated, task.get_host_state())
          run.on_save(state.params, done)
      checkpointer.poll()
      dog.beat(done)
      if stopping:
        checkpointer.wait()
        raise _preempted(done, end, run.workdir)
  return checkpointer.restore_final(state)


def _is_due(step: int, every: int, end: int) -> bool:
  return step == end or (every > 0 and step % every == 0)


def _preempted(step: int, end: int, workdir: pathlib.Path) -> Exception:
  return errors.PreemptedError(
    f"Stopped on request after step {step} of {end}.",
    where=str(workdir),
    why="The process received a signal; the state is saved.",
    fix="Run the same command again: it resumes from this step.",
  )


def _evaluate(
  state: train_state.TrainState,
  step: int,
  task: Task,
  writer: train_writer.Writer,
) -> Metrics:
  """Evaluates and writes the metrics, if the task has held-out data."""
  with task.clock.phase("eval"):
    evaluated = task.evaluate(state, step)
  if evaluated:
    writer.write(step, evaluated)
  return evaluated


def _log(
  step: int,
  window: list[Metrics],
  writer: train_writer.Writer,
  clock: train_clock.Clock,
  speed: train_speed.Speed,
) -> None:
  """Writes the mean metrics of the steps since the last line, if any."""
  if window:
    writer.write(step, _summarize(window, clock, speed))
    window.clear()


def _summarize(
  window: list[Metrics], clock: train_clock.Clock, speed: train_speed.Speed
) -> dict[str, float]:
  """Combines each metric over the steps that reported it; adds times."""
  with clock.phase("train"):  # The devices may still be computing.
    window = jax.device_get(window)
  norms = [float(m.get("grad_norm", 0.0)) for m in window]
  means = {
    "updated_fraction": sum(0 < n < math.inf for n in norms) / len(norms)
  }
  for name in dict.fromkeys(name for metrics in window for name in metrics):
    values = [float(m[name]) for m in window if name in m]
    means[name] = optimizer_step.combine(name, values)
  return {**means, **speed.take(means, len(window)), **memory.measure()}
