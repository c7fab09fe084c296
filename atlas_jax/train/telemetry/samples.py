# SPDX-License-Identifier: Apache-2.0
"""Saves samples of a teacher's completions, for reading.

Under the workdir:

  completions/step-N.jsonl          a sample of a step, with every reward part
  stored_completions/N.csv          step, prompt, completion, reward
  successful_teaching/step-N.jsonl  teachings with a high enough reward

N counts steps done, as in `metrics.jsonl`. A step repeated after a resume
replaces its files. The last two have ATLAS's fields.
"""

from collections.abc import Iterable, Mapping, Sequence
import csv
import datetime
import io
import json
import pathlib
from typing import Any

import numpy as np

from atlas_jax import errors, types
from atlas_jax.train.telemetry import writer as train_writer

_CSV_COLUMNS = ("step", "prompt", "completion", "reward")
_SHOWN = ("question", "completion", "taught", "reward")

# A record and its reward.
_Rewarded = tuple[types.TeachingRecord, types.Reward]


class SampleLog:
  """Saves samples of each step to disk."""

  def __init__(
    self,
    writer: train_writer.Writer,
    *,
    seed: int,
    log_completions_every: int,
    num_completions: int,
    stored_fraction: float,
    successful_reward: float,
  ) -> None:
    """Configures which samples are saved.

    Args:
      writer: writer of the run; receives the tables.
      seed: seed of the sampling.
      log_completions_every: steps between samples of completions; 0 for none.
      num_completions: rows per table.
      stored_fraction: probability that a completion is stored in the CSV file.
      successful_reward: teachings with at least this reward are saved, at every
        step.

    Raises:
      errors.ConfigError: if `stored_fraction` is outside [0, 1].
    """
    if not 0.0 <= stored_fraction <= 1.0:
      raise errors.ConfigError(
        f"stored_fraction must be in [0, 1], got {stored_fraction}.",
        where=f"--config.samples.stored_fraction={stored_fraction}",
        why="It is the probability that a completion is stored.",
        fix="Set it to 0.1, for example, or to 0 to store none.",
      )
    self._writer, self._seed = writer, seed
    self._every, self._num_completions = log_completions_every, num_completions
    self._stored_fraction = stored_fraction
    self._successful_reward = successful_reward

  def save(
    self,
    step: int,
    records: Sequence[types.TeachingRecord],
    rewarded: Sequence[types.Reward],
  ) -> None:
    """Saves samples of the rewarded records after `step` steps."""
    if isinstance(self._writer, train_writer.Silent):
      return  # Another process saves them.
    pairs = list(zip(records, rewarded, strict=True))
    if self._every and step % self._every == 0:
      rng = np.random.default_rng((self._seed, step))
      size = min(self._num_completions, len(pairs))
      chosen = sorted(rng.choice(len(pairs), size, replace=False))
      rows = _with_all_columns([self._row(*pairs[i]) for i in chosen])
      self._writer.table(step, "completions", rows, shown=_SHOWN)
      is_stored = rng.random(len(pairs)) < self._stored_fraction
      self._write_csv(step, [pairs[i] for i in np.flatnonzero(is_stored)])
    self._write_successful(step, pairs)

  def _row(
    self, record: types.TeachingRecord, reward: types.Reward
  ) -> dict[str, Any]:  # Any: text, numbers or None.
    """Returns a table row, with the first of several answers."""
    taught, baseline = _first(record.taught), _first(record.baseline)
    completion = record.teacher_rollout.completion
    return {
      "row_id": record.question.row_id,
      "question": record.question.question,
      "answer": record.question.answer,
      "probe": record.probe,
      "completion": record.completion_text,
      "taught": taught.text,
      "baseline": baseline.text,
      "taught_correct": taught.correct,
      "baseline_correct": baseline.correct,
      "num_tokens": len(completion.token_ids),
      "finish_reason": completion.finish_reason,
      "version": completion.version,
      "reward": reward.value,
      "missing_reason": reward.missing_reason,
      **{f"rewards/{name}": part for name, part in reward.parts.items()},
    }

  def _write_csv(self, step: int, pairs: Sequence[_Rewarded]) -> None:
    """Writes the stored completions of a step."""
    if not self._stored_fraction:
      return
    text = io.StringIO()
    table = csv.writer(
      text,
      quoting=csv.QUOTE_ALL,
      escapechar="\\",
      doublequote=False,
      lineterminator="\n",
    )
    table.writerow(_CSV_COLUMNS)
    for record, reward in pairs:
      prompt = record.teacher_rollout.prompt.text
      table.writerow([step, prompt, record.completion_text, reward.value])
    folder = self._folder("stored_completions")
    train_writer.write_atomically(folder / f"{step}.csv", text.getvalue())

  def _write_successful(self, step: int, pairs: Sequence[_Rewarded]) -> None:
    """Writes the successful teachings of a step to one file, if any."""
    path = self._folder("successful_teaching") / f"step-{step}.jsonl"
    path.unlink(missing_ok=True)  # Written by this step before a resume.
    now = datetime.datetime.now(datetime.UTC).isoformat()
    lines = [
      json.dumps(
        {
          "step": step,
          "timestamp": now,
          "sample_index": i,
          **self._atlas_fields(record, reward),
        },
        ensure_ascii=False,
      )
      for i, (record, reward) in enumerate(pairs)
      if reward.value is not None and reward.value >= self._successful_reward
    ]
    if lines:
      train_writer.write_atomically(path, "\n".join(lines) + "\n")

  def _atlas_fields(
    self, record: types.TeachingRecord, reward: types.Reward
  ) -> dict[str, Any]:  # Any: JSON.
    """Returns a record under ATLAS's field names, with an empty history."""
    taught, baseline = _first(record.taught), _first(record.baseline)
    return {
      "prompt": record.question.question,
      "student_approach": record.probe,
      "teaching_content": record.teaching,
      "full_teacher_response": record.completion_text,
      "student_solution": taught.answer,
      "baseline_solution": baseline.answer,
      "ground_truth": record.question.answer,
      "reward": reward.value,
      "prior_reward": None,
      "reward_breakdown": dict(reward.parts),
      "guidance_history": [],
      "step_context": None,
      "student_full_response": taught.text,
      "baseline_full_response": baseline.text,
    }

  def _folder(self, name: str) -> pathlib.Path:
    folder = self._writer.workdir / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _first(attempts: Sequence[types.Attempt]) -> types.Attempt:
  """Returns the first answer, or an empty one if there are no answers."""
  return attempts[0] if attempts else types.Attempt("", 0, "stop")


def _with_all_columns(
  rows: Iterable[Mapping[str, Any]],  # Any: as in `_row`.
) -> list[dict[str, Any]]:
  """Adds missing columns, as None; a missing reward has no parts."""
  rows = list(rows)
  columns = dict.fromkeys(column for row in rows for column in row)
  return [{column: row.get(column) for column in columns} for row in rows]
