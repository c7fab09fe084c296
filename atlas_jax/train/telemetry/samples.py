# SPDX-License-Identifier: Apache-2.0
"""What a teacher wrote, kept to be read: tables, and the teachings that worked.

Under the workdir:

  completions/step-N.jsonl         a sample of a step, with every reward part
  stored_completions/N.csv         step, prompt, completion, reward
  successful_teaching/step_..json  one per teaching whose reward is high enough

N counts steps done, as in `metrics.jsonl`. A step done again after a resume
replaces its files. The last two have the names and fields of ATLAS.
"""

from collections.abc import Iterable, Mapping, Sequence
import csv
import datetime
import io
import json
import pathlib
from typing import Any

import numpy as np

from atlas_jax import chat, errors, types
from atlas_jax.rewards import answers
from atlas_jax.train.telemetry import writer as train_writer

_CSV_COLUMNS = ("step", "prompt", "completion", "reward")
_SHOWN = ("question", "completion", "taught", "reward")

# A record, and what it got.
_Rewarded = tuple[types.TeachingRecord, types.Reward]


class SampleLog:
  """Keeps samples of each step on disk."""

  def __init__(
    self,
    writer: train_writer.Writer,
    tokenizer: chat.Tokenizer,
    *,
    seed: int,
    log_completions_every: int,
    num_completions: int,
    stored_fraction: float,
    successful_reward: float,
  ) -> None:
    """Sets what is kept.

    Args:
      writer: of the run; takes the tables.
      tokenizer: of the policy.
      seed: decides the samples.
      log_completions_every: steps between samples of completions; 0 for none.
      num_completions: that a table shows.
      stored_fraction: the chance of a completion to be in the CSV file.
      successful_reward: teachings with this reward or more are kept, of every
        step.

    Raises:
      errors.ConfigError: if the fraction is none.
    """
    if not 0.0 <= stored_fraction <= 1.0:
      raise errors.ConfigError(
        "The fraction of completions to store is no fraction.",
        where=f"--config.samples.stored_fraction={stored_fraction}",
        why="It is a chance, between 0 and 1.",
        fix="Set it to 0.1, for example, or to 0 to store none.",
      )
    self._writer, self._tokenizer, self._seed = writer, tokenizer, seed
    self._every, self._num_completions = log_completions_every, num_completions
    self._stored_fraction = stored_fraction
    self._successful_reward = successful_reward

  def save(
    self,
    step: int,
    records: Sequence[types.TeachingRecord],
    rewarded: Sequence[types.Reward],
  ) -> None:
    """Keeps what is worth keeping of graded records after `step` steps."""
    if isinstance(self._writer, train_writer.Silent):
      return  # Another process keeps it.
    pairs = list(zip(records, rewarded, strict=True))
    if self._every and step % self._every == 0:
      rng = np.random.default_rng((self._seed, step))
      size = min(self._num_completions, len(pairs))
      chosen = sorted(rng.choice(len(pairs), size, replace=False))
      rows = _fill([self._row(*pairs[i]) for i in chosen])
      self._writer.table(step, "completions", rows, shown=_SHOWN)
      is_stored = rng.random(len(pairs)) < self._stored_fraction
      self._store(step, [pairs[i] for i in np.flatnonzero(is_stored)])
    self._keep_successful(step, pairs)

  def _row(
    self, record: types.TeachingRecord, reward: types.Reward
  ) -> dict[str, Any]:  # Any: text, numbers or None.
    """Makes a row of the table; each with the first of several answers."""
    taught, baseline = _first(record.taught), _first(record.baseline)
    completion = record.teacher_rollout.completion
    return {
      "row_id": record.question.row_id,
      "question": record.question.question,
      "answer": record.question.answer,
      "probe": record.probe,
      "completion": self._text(record),
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

  def _store(self, step: int, pairs: Sequence[_Rewarded]) -> None:
    """Writes the CSV file of a step."""
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
      table.writerow([step, prompt, self._text(record), reward.value])
    folder = self._folder("stored_completions")
    train_writer.write_whole(folder / f"{step}.csv", text.getvalue())

  def _keep_successful(self, step: int, pairs: Sequence[_Rewarded]) -> None:
    """Writes a file for each teaching that did well."""
    folder = self._folder("successful_teaching")
    prefix = f"step_{step:06d}_sample_"
    for path in folder.glob(f"{prefix}*.json"):
      path.unlink()  # Of this step, before a resume.
    now = datetime.datetime.now(datetime.UTC)
    microseconds = round(now.timestamp() * 1e6)
    for i, (record, reward) in enumerate(pairs):
      if reward.value is None or reward.value < self._successful_reward:
        continue
      fields = {
        "step": step,
        "timestamp": now.isoformat(),
        "sample_index": i,
        **self._lesson(record, reward),
      }
      train_writer.write_whole(
        folder / f"{prefix}{i}_{microseconds}.json",
        json.dumps(fields, ensure_ascii=False, indent=2) + "\n",
      )

  def _lesson(
    self, record: types.TeachingRecord, reward: types.Reward
  ) -> dict[str, Any]:  # Any: JSON.
    """Names a record's fields as ATLAS does; its history has one lesson."""
    taught = _first(record.taught).text
    baseline = _first(record.baseline).text
    return {
      "prompt": record.question.question,
      "student_approach": record.probe,
      "teaching_content": record.teaching,
      "full_teacher_response": self._text(record),
      "student_solution": answers.extract(taught),
      "baseline_solution": answers.extract(baseline),
      "ground_truth": record.question.answer,
      "reward": reward.value,
      "prior_reward": None,
      "reward_breakdown": dict(reward.parts),
      "guidance_history": [],
      "step_context": None,
      "student_full_response": taught,
      "baseline_full_response": baseline,
    }

  def _text(self, record: types.TeachingRecord) -> str:
    token_ids = record.teacher_rollout.completion.token_ids
    return chat.decode(self._tokenizer, token_ids)

  def _folder(self, name: str) -> pathlib.Path:
    folder = self._writer.workdir / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _first(attempts: Sequence[types.Attempt]) -> types.Attempt:
  """Gives the first answer, or an empty one where there is none."""
  return attempts[0] if attempts else types.Attempt("", 0, "stop")


def _fill(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Gives every row the columns of all; a missing reward has no parts."""
  rows = list(rows)
  columns = dict.fromkeys(column for row in rows for column in row)
  return [{column: row.get(column) for column in columns} for row in rows]
