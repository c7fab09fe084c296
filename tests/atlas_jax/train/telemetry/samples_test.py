# SPDX-License-Identifier: Apache-2.0
"""Saved samples have ATLAS's fields, are complete and are saved once."""

import csv
import json

import pytest

from atlas_jax import errors, types
from atlas_jax.train.telemetry import samples, writer

_FIELDS = {
  "step",
  "timestamp",
  "sample_index",
  "prompt",
  "student_approach",
  "teaching_content",
  "full_teacher_response",
  "student_solution",
  "baseline_solution",
  "ground_truth",
  "reward",
  "prior_reward",
  "reward_breakdown",
  "guidance_history",
  "step_context",
  "student_full_response",
  "baseline_full_response",
}


def _record(i):
  text = f'<teaching>Say "{i}",\n\\ and stop.</teaching>'
  return types.TeachingRecord(
    question=types.Question(f"q{i}", f"What is {i}?", str(i)),
    probe="Hm.",
    teacher_rollout=types.Rollout(
      types.Prompt(f"q{i}/teach", f"Teach {i}.", (5,)),
      types.Completion((7, 2), (0.0, 0.0), (0.0, 0.0), "stop", 4),
    ),
    teaching=f'Say "{i}",\n\\ and stop.',
    num_teaching_tokens=1,
    baseline=(types.Attempt("Dunno.", 1, "stop", correct=False),),
    taught=(
      types.Attempt(
        f"The answer is {i}.", 4, "stop", correct=True, answer=str(i)
      ),
    ),
    leaked=False,
    completion_text=text,
  )


def _save(tmp_path, step, rewarded, **changes):
  log = writer.Writer(tmp_path, ())
  settings = {
    "log_completions_every": 2,
    "num_completions": 3,
    "stored_fraction": 1.0,
    "successful_reward": 1.0,
    **changes,
  }
  kept = samples.SampleLog(log, seed=0, **settings)
  log.begin(step=0, num_steps=10)
  records = [_record(i) for i in range(len(rewarded))]
  kept.save(step, records, rewarded)
  log.close()


_REWARDED = [
  types.Reward(1.5, parts={"gain": 1.0, "brevity": 0.5}),
  types.Reward(0.25, parts={"gain": 0.25, "brevity": 0.0}),
  types.Reward(None, "the judge did not answer"),
  types.Reward(1.0, parts={"gain": 1.0, "brevity": 0.0}),
]


def test_a_successful_teaching_is_saved_with_all_fields(tmp_path):
  _save(tmp_path, 7, _REWARDED)
  (path,) = (tmp_path / "successful_teaching").iterdir()
  assert path.name == "step-7.jsonl"
  lesson, other = map(json.loads, path.read_text("utf-8").splitlines())
  assert other["sample_index"] == 3
  assert set(lesson) == _FIELDS
  assert lesson["step"] == 7
  assert lesson["sample_index"] == 0
  assert lesson["prompt"] == "What is 0?"
  assert lesson["teaching_content"] == 'Say "0",\n\\ and stop.'
  assert lesson["full_teacher_response"].startswith("<teaching>Say")
  assert (lesson["student_solution"], lesson["baseline_solution"]) == (
    "0",
    None,
  )
  assert lesson["reward_breakdown"] == {"gain": 1.0, "brevity": 0.5}


def test_a_repeated_step_replaces_its_files(tmp_path):
  _save(tmp_path, 2, _REWARDED)
  _save(tmp_path, 20, _REWARDED)
  _save(tmp_path, 2, [types.Reward(0.0)])  # None is successful.
  (path,) = (tmp_path / "successful_teaching").iterdir()
  assert path.name == "step-20.jsonl"
  stored = (tmp_path / "stored_completions").iterdir()
  assert {path.name for path in stored} == {"2.csv", "20.csv"}


def test_stored_completions_are_quoted_and_read_back(tmp_path):
  _save(tmp_path, 2, _REWARDED)
  path = tmp_path / "stored_completions/2.csv"
  with path.open(encoding="utf-8", newline="") as file:
    rows = list(csv.DictReader(file, escapechar="\\", doublequote=False))
  assert [row["reward"] for row in rows] == ["1.5", "0.25", "", "1.0"]
  assert {row["step"] for row in rows} == {"2"}
  assert rows[1]["prompt"] == "Teach 1."
  text = '<teaching>Say "1",\n\\ and stop.</teaching>'
  assert rows[1]["completion"] == text


def test_the_table_has_every_part_of_every_reward(tmp_path):
  _save(tmp_path, 2, _REWARDED, num_completions=9)
  lines = (tmp_path / "completions/step-2.jsonl").read_text("utf-8").split("\n")
  rows = [json.loads(line) for line in lines if line]
  assert [row["rewards/gain"] for row in rows] == [1.0, 0.25, None, 1.0]
  assert rows[2]["missing_reason"] == "the judge did not answer"
  assert all(row["version"] == 4 for row in rows)


def test_completions_are_sampled_at_the_interval(tmp_path):
  for step in (1, 2, 3):
    _save(tmp_path, step, _REWARDED)
  assert [p.name for p in (tmp_path / "completions").iterdir()] == [
    "step-2.jsonl"
  ]
  rows = (tmp_path / "completions/step-2.jsonl").read_text().splitlines()
  assert len(rows) == 3


def test_disabled_samples_are_not_saved(tmp_path):
  _save(
    tmp_path,
    2,
    _REWARDED,
    log_completions_every=0,
    successful_reward=9.0,
  )
  assert not (tmp_path / "completions").exists()
  assert not (tmp_path / "stored_completions").exists()
  assert not list((tmp_path / "successful_teaching").iterdir())


def test_a_stored_fraction_outside_of_0_and_1_is_rejected(tmp_path):
  with pytest.raises(errors.ConfigError, match="stored_fraction must be in"):
    _save(tmp_path, 2, _REWARDED, stored_fraction=10)
