# SPDX-License-Identifier: Apache-2.0
"""Metrics to a JSONL file, which is the truth, and to one console line."""

from collections.abc import Mapping
import json
import math
import os
import pathlib
import time

from absl import logging
import jax

# Prefixes of metrics that would crowd the console line.
_FILE_ONLY = ("seconds/", "rewards/", "rollout/", "ratio_", "clip_", "num_")


class Writer:
  """Appends one JSON object per call, with its step and wall time.

  Opened again after a resume, it drops the lines of steps that will be done
  again, so that each step is told once.
  """

  def __init__(self, path: pathlib.Path, *, step: int, num_steps: int) -> None:
    """Keeps the lines up to `step`, the number of steps done."""
    self._num_steps = num_steps
    self._first_step, self._start = step, time.monotonic()
    kept = _lines_up_to(path, step) if path.exists() else []
    partial = path.with_suffix(".tmp")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)
    self._file = path.open("a", encoding="utf-8")

  def write(self, step: int, metrics: Mapping[str, float | jax.Array]) -> None:
    """Writes metrics after `step` steps, and shows them."""
    values = {k: float(v) for k, v in metrics.items()}
    # JSON has no NaN; null is what a reader can test for.
    row = {k: v if math.isfinite(v) else None for k, v in values.items()}
    line = json.dumps({"step": step, "time": time.time(), **row})
    self._file.write(line + "\n")
    self._file.flush()
    shown = " ".join(
      f"{name}={value:.4g}"
      for name, value in values.items()
      if not name.startswith(_FILE_ONLY)
    )
    logging.info(
      "step %d/%d %s eta=%s",
      *(step, self._num_steps, shown, self._eta(step)),
    )

  def close(self) -> None:
    """Makes sure that every line is on disk."""
    self._file.flush()
    os.fsync(self._file.fileno())
    self._file.close()

  def _eta(self, step: int) -> str:
    done = step - self._first_step
    if done < 1:
      return "?"
    left = self._num_steps - step
    seconds = round((time.monotonic() - self._start) / done * left)
    return f"{seconds // 60}m{seconds % 60:02d}s"


def _lines_up_to(path: pathlib.Path, step: int) -> list[str]:
  """Reads whole lines of steps that stay; a torn last line is dropped."""
  kept = []
  for line in path.read_text("utf-8").splitlines(keepends=True):
    try:
      row = json.loads(line)
    except json.JSONDecodeError:
      continue
    if row["step"] <= step:
      kept.append(line.rstrip("\n") + "\n")
  return kept
