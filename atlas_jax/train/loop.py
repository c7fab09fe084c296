# SPDX-License-Identifier: Apache-2.0
"""The loop every recipe runs in: steps, logs, evaluation, checkpoints.

It knows no algorithm. A recipe gives it a task: what a step is.
"""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import pathlib

import jax

from atlas_jax import checkpoint, errors
from atlas_jax.train import train_state
from atlas_jax.train.guards import nonfinite, watchdog
from atlas_jax.train.telemetry import clock as train_clock
from atlas_jax.train.telemetry import profile
from atlas_jax.train.telemetry import speed as train_speed
from atlas_jax.train.telemetry import writer as train_writer

Metrics = Mapping[str, float | jax.Array]
Evaluate = Callable[[train_state.TrainState, int], Metrics]


@dataclasses.dataclass(frozen=True)
class Task:
  """What a recipe gives the loop.

  Attributes:
    do_step: does one step, given how many are done. Its metrics are averaged
      over the steps between two logs. It need not wait for the devices.
    evaluate: metrics on held-out data, given how many steps are done.
    on_save: called after each checkpoint, with how many are done.
    row_ids: names the data of the step that `do_step` does.
    clock: splits the time of a step; `do_step` may tell it phases.
    get_host_state: gives what else a resumed run must have, as JSON.
    set_host_state: takes that, before the first step.
  """

  do_step: Callable[
    [train_state.TrainState, int], tuple[train_state.TrainState, Metrics]
  ]
  evaluate: Evaluate
  on_save: Callable[[train_state.TrainState, int], None]
  row_ids: nonfinite.RowIds
  clock: train_clock.Clock
  get_host_state: Callable[[], checkpoint.HostState] = dict
  set_host_state: Callable[[checkpoint.HostState], None] = lambda _: None


@dataclasses.dataclass(frozen=True)
class Settings:
  """How long to train, and when what else happens.

  Attributes:
    num_steps: steps in all, those before a resume included.
    log_every: steps between lines of metrics; there is one before each
      checkpoint as well.
    eval_every: steps between evaluations; 0 for one at the end only.
    save_every: steps between checkpoints. One is saved at the end anyway, and
      one whenever an evaluation is the best so far.
    max_nonfinite: updates in a row that may be skipped as not finite.
    profile_steps: those to trace, such as "3:5"; "" for none.
    watchdog_s: what a step, with its evaluation and save, may take before the
      process is given up as hanging; 0.0 for ever.
  """

  num_steps: int
  log_every: int
  eval_every: int
  save_every: int
  max_nonfinite: int
  profile_steps: str
  watchdog_s: float

  def __post_init__(self) -> None:
    """Refuses rhythms of less than a step, and a trace of none."""
    for name in ("num_steps", "log_every", "save_every"):
      if getattr(self, name) < 1:
        raise errors.ConfigError(
          f"{name} is {getattr(self, name)}.",
          where=f"--config.loop.{name}",
          why="It counts steps, and there is at least one.",
          fix="Set it to 1 or more.",
        )
    profile.parse(self.profile_steps, self.num_steps)
    if self.watchdog_s < 0.0:
      raise errors.ConfigError(
        "The watchdog would bark before it is there.",
        where=f"--config.loop.watchdog_s={self.watchdog_s}",
        why="It is what a step may take, in seconds.",
        fix="Set it well above the slowest step, or to 0 for no watchdog.",
      )


def run(
  state: train_state.TrainState,
  task: Task,
  settings: Settings,
  *,
  checkpointer: checkpoint.Checkpointer,
  workdir: pathlib.Path,
  writer: train_writer.Writer,
  should_stop: Callable[[], bool],
) -> train_state.TrainState:
  """Runs until all steps are done; gives the final state, or the best.

  Args:
    state: where to start; replaced by the newest checkpoint, if there is one.
    task: of the recipe.
    settings: how long, how often.
    checkpointer: of this run; knows which evaluation is the best.
    workdir: of this run.
    writer: takes the metrics; closed at the end.
    should_stop: asked after each step; then the state is saved at once.

  Raises:
    errors.PreemptedError: after a save, if `should_stop` said so.
    errors.DivergedError: if too many updates in a row were not finite.
  """
  state, host_state = checkpointer.restore_latest(state)
  if host_state:
    task.set_host_state(host_state)
  start, end = int(state.step), settings.num_steps
  writer.begin(step=start, num_steps=end)
  watch = nonfinite.Watch(task.row_ids, workdir, settings.max_nonfinite)
  window: list[Metrics] = []
  clock = task.clock
  with (
    contextlib.closing(writer),
    watchdog.Watchdog(settings.watchdog_s, checkpointer.steps) as dog,
    checkpointer,
    train_speed.Speed(clock) as speed,
    profile.Profile(
      profile.parse(settings.profile_steps, end), workdir
    ) as trace,
  ):
    for step in range(start + 1, end + 1):
      trace.before(step, state)
      state, metrics = task.do_step(state, step - 1)
      state = state._replace(step=state.step + 1)
      window.append(metrics)
      with clock.phase("train"):
        watch.add(step, metrics)
      writer.advance(step)
      evaluated: Metrics = {}
      if _is_due(step, settings.log_every, end):
        _tell(step, window, writer, clock, speed)
      if _is_due(step, settings.eval_every, end):
        with clock.phase("eval"):
          evaluated = task.evaluate(state, step)
        if evaluated:
          writer.write(step, evaluated)
      stopping = should_stop() and step < end
      is_best = checkpointer.is_best(evaluated)
      if stopping or is_best or _is_due(step, settings.save_every, end):
        # A resumed run does not know them any more.
        _tell(step, window, writer, clock, speed)
        with clock.phase("save"):
          watch.settle()
          checkpointer.save(step, state, evaluated, task.get_host_state())
          task.on_save(state, step)
      checkpointer.poll()
      dog.beat(step)
      if stopping:
        checkpointer.wait()
        raise _preempted(step, end, workdir)
  return checkpointer.restore_final(state)


def _is_due(step: int, every: int, end: int) -> bool:
  return step == end or (every > 0 and step % every == 0)


def _preempted(step: int, end: int, workdir: pathlib.Path) -> Exception:
  return errors.PreemptedError(
    f"Stopped on request after step {step} of {end}.",
    where=str(workdir),
    why="The process was asked to stop; the state is saved.",
    fix="Run the same command again: it goes on from this step.",
  )


def _tell(
  step: int,
  window: list[Metrics],
  writer: train_writer.Writer,
  clock: train_clock.Clock,
  speed: train_speed.Speed,
) -> None:
  """Writes the metrics of the steps since the last line, if there are any."""
  if window:
    writer.write(step, _summarize(window, clock, speed))
    window.clear()


def _summarize(
  window: list[Metrics], clock: train_clock.Clock, speed: train_speed.Speed
) -> dict[str, float]:
  """Averages each metric over the steps that reported it, and tells times."""
  with clock.phase("train"):  # The devices may still be at work.
    window = jax.device_get(window)
  means = {}
  for name in dict.fromkeys(name for metrics in window for name in metrics):
    values = [float(m[name]) for m in window if name in m]
    means[name] = sum(values) / len(values)
  return {**means, **speed.take(means, len(window))}
