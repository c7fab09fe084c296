# SPDX-License-Identifier: Apache-2.0
"""What a run tells: `metrics.jsonl` is the truth, the rest a view of it."""

from collections.abc import Mapping, Sequence
import json
import math
import os
import pathlib
import time

from absl import logging
import jax

from atlas_jax.train.telemetry import console, sinks


class Writer:
  """Metrics and tables of a run, on disk, on the console and to trackers.

  Each call appends one line to `metrics.jsonl`, with its step and time. Opened
  again after a resume, it drops the lines of steps that will be done again, so
  that each step is told once. Tables are files of their own, which a step done
  again replaces.
  """

  def __init__(
    self, workdir: pathlib.Path, trackers: Sequence[sinks.Background]
  ) -> None:
    """Takes the run's folder, and what else shall have its metrics."""
    self.workdir, self._trackers = workdir, trackers

  def begin(self, *, step: int, num_steps: int) -> None:
    """Opens everything, and keeps the lines up to `step`, the steps done."""
    path = self.workdir / "metrics.jsonl"
    lines = _lines(path) if path.exists() else []
    kept = [line for number, line in lines if number <= step]
    last = max((number for number, _ in lines), default=step)
    if last > step:
      logging.info("Lost, and done again: steps %d to %d.", step + 1, last)
    write_whole(path, "".join(kept))
    self._file = path.open("a", encoding="utf-8")
    self._console = console.Console(step=step, num_steps=num_steps)
    for tracker in self._trackers:
      tracker.start()

  def advance(self, step: int) -> None:
    """Shows that `step` steps are done."""
    self._console.advance(step)

  def write(self, step: int, metrics: Mapping[str, float | jax.Array]) -> None:
    """Writes metrics after `step` steps, and shows them."""
    values = {k: float(v) for k, v in metrics.items()}
    # JSON has no NaN; null is what a reader can test for.
    row = {k: v if math.isfinite(v) else None for k, v in values.items()}
    line = json.dumps({"step": step, "time": time.time(), **row})
    self._file.write(line + "\n")
    self._file.flush()
    self._console.tell(step, values)
    finite = {k: v for k, v in values.items() if math.isfinite(v)}
    for tracker in self._trackers:
      tracker.scalars(step, finite)

  def table(
    self,
    step: int,
    name: str,
    rows: Sequence[sinks.Row],
    *,
    shown: Sequence[str],
  ) -> None:
    """Writes rows of the same columns to `NAME/step-STEP.jsonl`.

    Trackers get all columns, the console those which are `shown`.
    """
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path = self.workdir / name / f"step-{step}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(lines))
    if rows:
      self._console.table(
        f"{name} of step {step}",
        [{column: row[column] for column in shown} for row in rows],
      )
      for tracker in self._trackers:
        tracker.table(step, name, rows)

  def close(self) -> None:
    """Makes sure that every line is on disk."""
    self._console.close()
    self._file.flush()
    os.fsync(self._file.fileno())
    self._file.close()
    for tracker in self._trackers:
      tracker.close()


class Silent(Writer):
  """Takes what another process of the run tells already, and keeps nothing."""

  def begin(self, *, step: int, num_steps: int) -> None:
    """Opens nothing."""
    del step, num_steps

  def advance(self, step: int) -> None:
    """Shows nothing."""
    del step

  def write(self, step: int, metrics: Mapping[str, float | jax.Array]) -> None:
    """Writes nothing."""
    del step, metrics

  def table(
    self,
    step: int,
    name: str,
    rows: Sequence[sinks.Row],
    *,
    shown: Sequence[str],
  ) -> None:
    """Writes nothing."""
    del step, name, rows, shown

  def close(self) -> None:
    """Has nothing to close."""


def write_whole(path: pathlib.Path, text: str) -> None:
  """Writes a file of which nobody ever sees a part."""
  partial = path.with_name(f"{path.name}.tmp")
  partial.write_text(text, encoding="utf-8")
  partial.replace(path)


def last(workdir: pathlib.Path) -> dict[str, tuple[int, float]]:
  """Reads the last finite value of what tells how good a run's weights are.

  Returns:
    The loss, the reward and all of the last evaluation, each with its step.
  """
  path = workdir / "metrics.jsonl"
  found: dict[str, tuple[int, float]] = {}
  for line in path.read_text("utf-8").splitlines() if path.exists() else ():
    row = json.loads(line)
    for name, value in row.items():
      is_told = name in ("loss", "reward") or name.startswith("eval/")
      if is_told and value is not None:
        found[name] = (row["step"], value)
  return found


def _lines(path: pathlib.Path) -> list[tuple[int, str]]:
  """Reads whole lines with their steps; a torn last line is dropped."""
  lines = []
  for line in path.read_text("utf-8").splitlines(keepends=True):
    try:
      step = json.loads(line)["step"]
    except json.JSONDecodeError:
      continue
    lines.append((step, line.rstrip("\n") + "\n"))
  return lines
