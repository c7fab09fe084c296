# SPDX-License-Identifier: Apache-2.0
"""The loop every recipe runs in: steps, logs, evaluation, checkpoints.

It knows no algorithm. A recipe gives it a function that does one step.
"""

from collections.abc import Callable, Mapping
import pathlib
import time

from absl import logging
import jax

from atlas_jax import checkpoint, errors
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
    workdir: where `metrics.jsonl` goes.
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
  writer = train_writer.Writer(
    workdir / "metrics.jsonl", step=step, num_steps=num_steps
  )
  window: list[Metrics] = []
  window_start = time.monotonic()
  try:
    while step < num_steps:
      state, metrics = do_step(state, step)
      step += 1
      state = state._replace(step=state.step + 1)
      window.append(metrics)
      _check_finite(metrics, step, max_nonfinite)
      last = step == num_steps
      if step % log_every == 0 or last:
        mean = _mean(window)
        mean["step_s"] = (time.monotonic() - window_start) / len(window)
        if "num_tokens" in mean:
          mean["tokens_per_s"] = mean["num_tokens"] / mean["step_s"]
        writer.write(step, mean)
        window, window_start = [], time.monotonic()
      if last or (eval_every and step % eval_every == 0):
        evaluated = evaluate(state, step)
        if evaluated:
          writer.write(step, evaluated)
        window_start = time.monotonic()
      stopping = should_stop() and not last
      if last or stopping or step % save_every == 0:
        checkpointer.save(step, state)
        window_start = time.monotonic()
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
