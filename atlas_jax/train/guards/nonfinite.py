# SPDX-License-Identifier: Apache-2.0
"""Updates that were skipped because they were not finite, and their data."""

from collections.abc import Callable, Mapping, Sequence
import json
import pathlib
from typing import Any

from absl import logging
import jax

from atlas_jax import errors

# Names the rows of data that a step trains on, given how many are done.
RowIds = Callable[[int], Sequence[str]]


class Watch:
  """Looks at each step's count of skipped updates when the next one is queued.

  To read it at once would leave the devices idle until the host has prepared
  the next step.
  """

  def __init__(
    self, row_ids: RowIds, workdir: pathlib.Path, max_nonfinite: int
  ) -> None:
    """Lets `max_nonfinite` updates in a row be skipped."""
    self._row_ids = row_ids
    self._workdir = workdir
    self._max_nonfinite = max_nonfinite
    self._unseen: tuple[int, Mapping[str, float | jax.Array]] | None = None
    self._skipped: list[dict[str, Any]] = []  # Any: JSON.

  def add(self, step: int, metrics: Mapping[str, float | jax.Array]) -> None:
    """Takes the metrics of the step that was queued last.

    Raises:
      errors.DivergedError: as `settle`, for the step before it.
    """
    self.settle()
    self._unseen = (step, metrics)

  def settle(self) -> None:
    """Waits for the last step, and looks at it.

    Raises:
      errors.DivergedError: if too many updates in a row were skipped. Their
        rows, losses and gradient norms are then in `nonfinite-STEP.json`.
    """
    if self._unseen is None:
      return
    (step, metrics), self._unseen = self._unseen, None
    num_nonfinite = int(metrics.get("num_nonfinite", 0))
    if not num_nonfinite:
      self._skipped.clear()
      return
    logging.warning("Step %d: update skipped, not finite.", step)
    self._skipped.append(
      {
        "step": step,
        # As text: JSON has neither NaN nor infinity.
        "loss": str(float(metrics["loss"])),
        "grad_norm": str(float(metrics["grad_norm"])),
        "rows": list(self._row_ids(step - 1)),
      }
    )
    if num_nonfinite > self._max_nonfinite:
      self._give_up(step, num_nonfinite)

  def _give_up(self, step: int, num_nonfinite: int) -> None:
    path = self._workdir / f"nonfinite-{step}.json"
    path.write_text(json.dumps({"skipped": self._skipped}, indent=2), "utf-8")
    raise errors.DivergedError(
      f"{num_nonfinite} updates in a row were not finite.",
      where=f"step {step}; {path} names the data of these steps",
      why="The loss or its gradient holds NaN or infinity.",
      fix="Lower --config.schedule.learning_rate, or look at these data; the "
      "last checkpoint is from before the trouble.",
    )
