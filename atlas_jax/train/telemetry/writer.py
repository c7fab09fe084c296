# SPDX-License-Identifier: Apache-2.0
"""Writes the metrics of a run to `metrics.jsonl`, console and trackers."""

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
  """Writes metrics and tables to disk, to the console and to trackers.

  Each `write` appends one line to `metrics.jsonl`, with step and time. After a
  resume the lines of steps that will be repeated are dropped, so each step is
  logged once. Tables are separate files, which a repeated step replaces.
  """

  def __init__(
    self, workdir: pathlib.Path, trackers: Sequence[sinks.Background]
  ) -> None:
    """Stores the workdir and trackers; `begin` opens them."""
    self.workdir, self._trackers = workdir, trackers

  def begin(self, *, step: int, num_steps: int) -> None:
    """Opens all outputs, and drops lines after `step`, the steps done."""
    path = self.workdir / "metrics.jsonl"
    lines = _read_lines(path) if path.exists() else []
    kept = [line for number, line in lines if number <= step]
    last = max((number for number, _ in lines), default=step)
    if last > step:
      logging.info("Repeating lost steps %d to %d.", step + 1, last)
    write_atomically(path, "".join(kept))
    self._file = path.open("a", encoding="utf-8")
    self._console = console.Console(step=step, num_steps=num_steps)
    for tracker in self._trackers:
      tracker.start()

  def phase(self, name: str) -> None:
    """Shows the phases of the first step on the console."""
    self._console.phase(name)

  def note(self, text: str) -> None:
    """Shows a text of several lines on the console."""
    logging.info("%s", text)

  def advance(self, step: int, *, once_s: float) -> None:
    """Shows progress on the console; see `console.Console.advance`."""
    self._console.advance(step, once_s=once_s)

  def write(self, step: int, metrics: Mapping[str, float | jax.Array]) -> None:
    """Writes metrics after `step` steps to all outputs."""
    values = {k: float(v) for k, v in metrics.items()}
    # JSON has no NaN or infinity; readers can test for null.
    row = {k: v if math.isfinite(v) else None for k, v in values.items()}
    line = json.dumps({"step": step, "time": time.time(), **row})
    self._file.write(line + "\n")
    self._file.flush()
    self._console.report(step, values)
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
    """Writes rows with the same columns to `NAME/step-STEP.jsonl`.

    Trackers receive all columns, the console only those in `shown`.
    """
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path = self.workdir / name / f"step-{step}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(lines))
    if rows:
      self._console.table(
        f"{name} of step {step}",
        [{column: row[column] for column in shown} for row in rows],
      )
      for tracker in self._trackers:
        tracker.table(step, name, rows)

  def close(self) -> None:
    """Flushes `metrics.jsonl` to disk and closes all outputs."""
    self._console.close()
    self._file.flush()
    os.fsync(self._file.fileno())
    self._file.close()
    for tracker in self._trackers:
      tracker.close()


class Silent(Writer):
  """Discards everything, in processes other than the first of a run."""

  def begin(self, *, step: int, num_steps: int) -> None:
    """Does nothing."""
    del step, num_steps

  def phase(self, name: str) -> None:
    """Does nothing."""
    del name

  def note(self, text: str) -> None:
    """Does nothing."""
    del text

  def advance(self, step: int, *, once_s: float) -> None:
    """Does nothing."""
    del step, once_s

  def write(self, step: int, metrics: Mapping[str, float | jax.Array]) -> None:
    """Does nothing."""
    del step, metrics

  def table(
    self,
    step: int,
    name: str,
    rows: Sequence[sinks.Row],
    *,
    shown: Sequence[str],
  ) -> None:
    """Does nothing."""
    del step, name, rows, shown

  def close(self) -> None:
    """Does nothing."""


def write_atomically(path: pathlib.Path, text: str) -> None:
  """Writes a file by renaming, so that readers never see part of it."""
  partial = path.with_name(f"{path.name}.tmp")
  partial.write_text(text, encoding="utf-8")
  partial.replace(path)


def last(workdir: pathlib.Path) -> dict[str, tuple[int, float]]:
  """Returns the last finite value of each quality metric, with its step.

  These are `loss`, `reward` and every `eval/` metric, read from the workdir's
  `metrics.jsonl`; empty if it is missing.
  """
  path = workdir / "metrics.jsonl"
  found: dict[str, tuple[int, float]] = {}
  for line in path.read_text("utf-8").splitlines() if path.exists() else ():
    row = json.loads(line)
    for name, value in row.items():
      is_quality = name in ("loss", "reward") or name.startswith("eval/")
      if is_quality and value is not None:
        found[name] = (row["step"], value)
  return found


def is_untrained(workdir: pathlib.Path) -> bool:
  """Returns whether no step in `metrics.jsonl` updated the parameters.

  False if it has no line of a step.
  """
  path = workdir / "metrics.jsonl"
  lines = path.read_text("utf-8").splitlines() if path.exists() else []
  rows = map(json.loads, lines)
  updated = [
    # Earlier versions wrote no `updated_fraction`.
    row.get("updated_fraction", "loss" in row)
    for row in rows
    if "learning_rate" in row  # A line of training, not of evaluation.
  ]
  return bool(updated) and not any(updated)


def _read_lines(path: pathlib.Path) -> list[tuple[int, str]]:
  """Returns (step, line) pairs; drops a partially written last line."""
  lines = []
  for line in path.read_text("utf-8").splitlines(keepends=True):
    try:
      step = json.loads(line)["step"]
    except json.JSONDecodeError:
      continue
    lines.append((step, line.rstrip("\n") + "\n"))
  return lines
