# SPDX-License-Identifier: Apache-2.0
"""The loop every recipe runs in: steps, logs, evaluation, checkpoints.

It knows no algorithm. A recipe gives it a function that does one step.
"""

from collections.abc import Callable, Mapping
import pathlib

from absl import logging
import jax

from atlas_jax import checkpoint, errors
from atlas_jax.train import clock as train_clock
from atlas_jax.train import state as train_state
from atlas_jax.train import writer as train_writer

Metrics = Mapping[str, float | jax.Array]
# Does one step, given how many are done.
DoStep = Callable[
  [train_state.TrainState, int], tuple[train_state.TrainState, Metrics]
]
Evaluate = Callable[[train_state.TrainState, int], Metrics]


def run(  # noqa: PLR0913 - one argument per collaborator.
  state: train_state.TrainState,
  do_step: DoStep,
  evaluate: Evaluate,
  *,
  checkpointer: checkpoint.Checkpointer,
  workdir: pathlib.Path,
  writer: train_writer.Writer,
  clock: train_clock.Clock,
  should_stop: Callable[[], bool],
  num_steps: int,
  log_every: int,
  eval_every: int,
  save_every: int,
  max_nonfinite: int,
) -> train_state.TrainState:
  """Runs until `num_steps` steps are done.

  Args:
    state: where to start; replaced by the newest checkpoint, if there is one.
    do_step: one step of the recipe, with metrics to average and log.
    evaluate: metrics on held-out data.
    checkpointer: of this run.
    workdir: of this run.
    writer: takes the metrics; closed at the end.
    clock: splits the time of a step; `do_step` may tell it phases.
    should_stop: asked after each step; then the state is saved at once.
    num_steps: steps in all, those before a resume included.
    log_every: steps between lines of metrics.
    eval_every: steps between evaluations; 0 for one at the end only.
    save_every: steps between checkpoints; one is saved at the end anyway.
    max_nonfinite: updates in a row that may be skipped as not finite.

  Returns:
    The final state.

  Raises:
    errors.PreemptedError: after a save, if `should_stop` said so.
    errors.DivergedError: if too many updates in a row were not finite.
  """
  state = checkpointer.restore_latest(state)
  step = int(state.step)
  writer.begin(step=step, num_steps=num_steps)
  window: list[Metrics] = []
  clock.take()  # What came before the first step is no part of it.
  try:
    while step < num_steps:
      state, metrics = do_step(state, step)
      step += 1
      state = state._replace(step=state.step + 1)
      window.append(metrics)
      with clock.phase("train"):  # The device may still be at work.
        _check_finite(metrics, step, max_nonfinite)
      writer.advance(step)
      last = step == num_steps
      if step % log_every == 0 or last:
        with clock.phase("train"):
          mean = _mean(window)
        writer.write(step, {**mean, **_times(clock, mean, len(window))})
        window = []
      if last or (eval_every and step % eval_every == 0):
        with clock.phase("eval"):
          evaluated = evaluate(state, step)
        if evaluated:
          writer.write(step, evaluated)
      stopping = should_stop() and not last
      if last or stopping or step % save_every == 0:
        with clock.phase("save"):
          checkpointer.save(step, state)
      if stopping:
        raise errors.PreemptedError(
          f"Stopped on request after step {step} of {num_steps}.",
          where=str(workdir),
          why="The process was asked to stop; the state is saved.",
          fix="Run the same command again: it goes on from this step.",
        )
  finally:
    writer.close()
  return state


def _mean(window: list[Metrics]) -> dict[str, float]:
  """Averages each metric over the steps that reported it."""
  window = jax.device_get(window)
  names = dict.fromkeys(name for metrics in window for name in metrics)
  means = {}
  for name in names:
    values = [float(m[name]) for m in window if name in m]
    means[name] = sum(values) / len(values)
  return means


def _times(
  clock: train_clock.Clock, mean: Mapping[str, float], num_steps: int
) -> dict[str, float]:
  """Splits the time since the last line: seconds per step, and speed.

  Evaluations and checkpoints since then are in `step_s`, but slow no token.
  """
  taken = {phase: s / num_steps for phase, s in clock.take().items()}
  times = {f"seconds/{phase}": s for phase, s in taken.items()}
  times["step_s"] = sum(taken.values())
  if "num_tokens" in mean:
    apart = taken.get("eval", 0.0) + taken.get("save", 0.0)
    times["tokens_per_s"] = mean["num_tokens"] / (times["step_s"] - apart)
  return times


def _check_finite(metrics: Metrics, step: int, max_nonfinite: int) -> None:
  num_nonfinite = int(metrics.get("num_nonfinite", 0))
  if not num_nonfinite:
    return
  logging.warning("Step %d: update skipped, not finite.", step)
  if num_nonfinite > max_nonfinite:
    raise errors.DivergedError(
      f"{num_nonfinite} updates in a row were not finite.",
      where=f"step {step}",
      why="The loss or its gradient holds NaN or infinity.",
      fix="Lower --config.schedule.learning_rate, or look at the data of "
      "these steps; the last checkpoint is from before the trouble.",
    )
