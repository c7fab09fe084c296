# SPDX-License-Identifier: Apache-2.0
"""Tests evaluation from the command line."""

import json

import pytest

from tests import processes, tiny


@pytest.mark.slow
def test_records_and_summary_cover_every_question(tmp_path):
  tiny.write_talker(
    tmp_path / "model", num_hidden_layers=1, max_position_embeddings=512
  )
  questions = tmp_path / "questions.jsonl"
  rows = [{"question": f"{i} + {i}?", "answer": str(2 * i)} for i in range(3)]
  questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
  workdir = tmp_path / "run"
  flags = [
    "--config=configs/run/teaching_eval.py:smoke",
    f"--workdir={workdir}",
    "--config.world.directory=",
    f"--config.model.path={tmp_path}/model",
    f"--config.student.path={tmp_path}/model",
    f"--config.data.path={questions}",
    "--config.num_bootstrap=20",
    *(
      f"--config.sampling.{phase}.max_completion_tokens=8"
      for phase in ("probe", "baseline", "teach", "solve")
    ),
  ]
  job = processes.Job("evaluate", flags, split=True)
  stdout, stderr = job.communicate(processes.MAX_S)
  assert job.returncode == 0, stderr
  lines = (workdir / "records.jsonl").read_text().splitlines()
  assert len(lines) == 1 + 3
  summary = json.loads((workdir / "summary.json").read_text())["all"]
  assert "| student alone" in stdout
  assert summary["teaching/num_questions"] == 3
