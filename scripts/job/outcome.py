# SPDX-License-Identifier: Apache-2.0
"""The last lines of a run: what it learnt, or that it learnt nothing."""

import pathlib

from absl import logging

from atlas_jax import distributed, errors, types
from atlas_jax.train.telemetry import writer

UNTRAINED = (
  "no training step updated these weights; they are those the run started with."
)


def report(workdir: pathlib.Path, config: types.Config) -> None:
  """Logs the last metrics of a finished run, and whether it was updated.

  Args:
    workdir: with `metrics.jsonl`.
    config: `loop.require_updates`.

  Raises:
    errors.DivergedError: in all processes, if no step updated the parameters
      and `require_updates` is set.
  """
  distributed.wait("outcome")  # The first process has written the metrics.
  if not writer.is_untrained(workdir):
    if distributed.is_first():
      last = writer.last(workdir).items()
      logging.info(
        "Finished: %s",
        " ".join(f"{name}={value:.4g}" for name, (_, value) in last),
      )
    return
  if config.loop.require_updates:
    raise errors.DivergedError(
      "Nothing was learnt: no step updated the parameters.",
      where=f"{workdir}; --config.loop.require_updates=True",
      why="No step had a token to train on with a finite, nonzero gradient. "
      "Warnings in the log name the causes.",
      fix="Remove the causes, then train in a new --workdir. Checkpoints and "
      "the export hold the initial weights.",
    )
  if distributed.is_first():
    logging.warning(
      "NOTHING WAS LEARNT: no step updated the parameters, so the export holds "
      "the initial weights. Warnings above name the causes; with "
      "--config.loop.require_updates=True the run exits with code 4."
    )
