# SPDX-License-Identifier: Apache-2.0
"""Tests evaluation from the command line."""

import json

import pytest

from tests import processes, tiny


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """Returns a folder with a model and three questions."""
  path = tmp_path_factory.mktemp("evaluate")
  tiny.write_talker(
    path / "model", num_hidden_layers=1, max_position_embeddings=512
  )
  rows = [{"question": f"{i} + {i}?", "answer": str(2 * i)} for i in range(3)]
  text = "".join(json.dumps(row) + "\n" for row in rows)
  (path / "questions.jsonl").write_text(text)
  return path


def _evaluate(home, workdir, *options):
  """Evaluates; returns stdout and the summary."""
  flags = [
    "--config=configs/run/teaching_eval.py:smoke",
    f"--workdir={workdir}",
    "--config.world.directory=",
    f"--config.model.path={home}/model",
    f"--config.student.path={home}/model",
    f"--config.data.path={home}/questions.jsonl",
    "--config.num_bootstrap=20",
    *(
      f"--config.sampling.{phase}.max_completion_tokens=8"
      for phase in ("probe", "baseline", "teach", "solve")
    ),
    *options,
  ]
  job = processes.Job("evaluate", flags, split=True)
  stdout, stderr = job.communicate(processes.MAX_S)
  assert job.returncode == 0, stderr
  return stdout, json.loads((workdir / "summary.json").read_text())["all"]


@pytest.mark.slow
def test_records_and_summary_cover_every_question(home, tmp_path):
  stdout, summary = _evaluate(home, tmp_path)
  lines = (tmp_path / "records.jsonl").read_text().splitlines()
  assert len(lines) == 1 + 3
  assert "| student alone" in stdout
  assert summary["teaching/num_questions"] == 3


@pytest.mark.slow
def test_models_on_servers_are_evaluated(home, tmp_path):
  servers = {
    role: processes.Server(role, home / "model")
    for role in ("policy", "student")
  }
  try:
    for server in servers.values():
      server.wait()
    _, summary = _evaluate(
      home,
      tmp_path / "run",
      "--config.rollout.backend=http",
      f"--config.rollout.weights_root={tmp_path}/weights",
      *(
        f"--config.rollout.{role}_urls=('{server.url}',)"
        for role, server in servers.items()
      ),
    )
  finally:
    for server in servers.values():
      server.stop()
  assert summary["teaching/num_questions"] == 3
