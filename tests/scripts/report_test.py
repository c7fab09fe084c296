# SPDX-License-Identifier: Apache-2.0
"""Tests the table of the quickstart."""

import json

import pytest

from atlas_jax import errors, types
from atlas_jax.evaluation import tables
from scripts import report


def _record(teaching):
  attempt = types.Attempt("", 1, "stop", correct=True)
  completion = types.Completion((1,), (0.0,), (0.0,), "stop", 0)
  return types.TeachingRecord(
    question=types.Question("q", "1 + 1", "2"),
    probe="",
    teacher_rollout=types.Rollout(types.Prompt("q", "", (1,)), completion),
    teaching=teaching,
    num_teaching_tokens=4 if teaching else 0,
    baseline=(attempt,),
    taught=(attempt,),
    leaked=False,
  )


def _efficiency(teaching):
  return tables.taught("taught", [_record(teaching)]).split("|")[-2].strip()


def test_a_teacher_without_teachings_has_no_efficiency():
  assert _efficiency(None) == ""
  assert _efficiency("Add.") == "0.0"


def _write_records(workdir, records):
  workdir.mkdir()
  lines = ["{}", *map(types.to_json_line, records)]
  (workdir / "records.jsonl").write_text("".join(f"{x}\n" for x in lines))


def test_any_run_is_reported(tmp_path, capsys):
  rows = [
    {"step": 1, "time": 0.0, "loss": 2.0, "eval/loss": None},
    {"step": 9, "time": 60.0, "loss": 0.5, "eval/loss": 0.75},
  ]
  (tmp_path / "sft").mkdir()
  lines = "".join(json.dumps(row) + "\n" for row in rows)
  (tmp_path / "sft/metrics.jsonl").write_text(lines)
  for name in ("before", "after"):
    _write_records(tmp_path / name, [_record("Add.")])

  report.print_runs([tmp_path / name for name in ("sft", "before", "after")])

  printed = capsys.readouterr().out
  assert "| loss | 2 | 0.5 | 0.5 | 2 |" in printed
  assert "| eval/loss | 0.75 | 0.75 | 0.75 | 0.75 |" in printed
  assert "Steps 1 to 9, 1.0 minutes" in printed
  assert printed.count("| student taught") == 2
  assert "accuracy on the same 1 questions: +0.000 [+0.000, +0.000]" in printed


def test_a_folder_without_a_run_is_rejected(tmp_path):
  with pytest.raises(errors.ConfigError, match="not the workdir of a run"):
    report.print_runs([tmp_path])
