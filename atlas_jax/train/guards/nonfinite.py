# SPDX-License-Identifier: Apache-2.0
"""Records skipped non-finite updates with their data, and limits them."""

from collections.abc import Callable, Mapping, Sequence
import json
import pathlib
from typing import Any

from absl import logging
import jax

from atlas_jax import errors

# Returns the ids of the data rows of a step, given the number of steps done.
RowIds = Callable[[int], Sequence[str]]


class Watch:
  """Checks each step's count of skipped updates once the next step is queued.

  Reading the count immediately would leave the devices idle until the host has
  prepared the next step.
  """

  def __init__(
    self, row_ids: RowIds, workdir: pathlib.Path, max_nonfinite: int
  ) -> None:
    """Allows up to `max_nonfinite` consecutive skipped updates."""
    self._row_ids = row_ids
    self._workdir = workdir
    self._max_nonfinite = max_nonfinite
    self._pending: tuple[int, Mapping[str, float | jax.Array]] | None = None
    self._skipped: list[dict[str, Any]] = []  # Any: JSON.

  def add(self, step: int, metrics: Mapping[str, float | jax.Array]) -> None:
    """Adds the metrics of the step just queued, and checks the previous step.

    Raises:
      errors.DivergedError: see `settle`.
    """
    self.settle()
    self._pending = (step, metrics)

  def settle(self) -> None:
    """Waits for the last added step and checks its count.

    Raises:
      errors.DivergedError: if too many updates in a row were skipped. Their
        rows, losses and gradient norms are written to `nonfinite-STEP.json`.
    """
    if self._pending is None:
      return
    (step, metrics), self._pending = self._pending, None
    num_nonfinite = int(metrics.get("num_nonfinite", 0))
    if not num_nonfinite:
      self._skipped.clear()
      return
    logging.warning("Skipped a non-finite update at step %d.", step)
    self._skipped.append(
      {
        "step": step,
        # As strings: JSON has neither NaN nor infinity.
        "loss": str(float(metrics["loss"])),
        "grad_norm": str(float(metrics["grad_norm"])),
        "rows": list(self._row_ids(step - 1)),
      }
    )
    if num_nonfinite > self._max_nonfinite:
      self._write_and_raise(step, num_nonfinite)

  def _write_and_raise(self, step: int, num_nonfinite: int) -> None:
    path = self._workdir / f"nonfinite-{step}.json"
    path.write_text(json.dumps({"skipped": self._skipped}, indent=2), "utf-8")
    raise errors.DivergedError(
      f"{num_nonfinite} updates in a row were not finite.",
      where=f"step {step}; {path} lists the data rows of these steps",
      why="The loss or its gradient contains NaN or infinity.",
      fix="Lower --config.schedule.learning_rate, or inspect these rows. "
      "Skipped updates change no parameters, so the last checkpoint is intact.",
    )
