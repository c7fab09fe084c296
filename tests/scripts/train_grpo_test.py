# SPDX-License-Identifier: Apache-2.0
"""Tests GRPO from the command line: training, export and adapters."""

import json
import re

import pytest

from tests import processes, tiny


def _write_questions(directory):
  questions = directory / "questions.jsonl"
  rows = [{"question": f"{i} + {i}?", "answer": str(2 * i)} for i in range(6)]
  questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return questions


def _run(flags, workdir):
  processes.succeed(processes.Job("train_grpo", flags))
  return (workdir / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_a_finished_run_has_exported_and_does_not_train_again(tmp_path):
  for name in ("policy", "student"):
    tiny.write_talker(
      tmp_path / name, num_hidden_layers=1, max_position_embeddings=512
    )
  questions = _write_questions(tmp_path)
  workdir = tmp_path / "run"
  flags = [
    "--config=configs/run/teacher_rcl.py:smoke",
    f"--workdir={workdir}",
    "--config.world.directory=",
    f"--config.model.path={tmp_path}/policy",
    f"--config.student.path={tmp_path}/student",
    f"--config.data.path={questions}",
    "--config.held_out.path=",
    "--config.held_out.fraction=0.3",
    "--config.batch.num_questions=2",
    "--config.batch.mask_truncated=False",
    "--config.sampling.teach.group_size=2",
    "--config.reward.weights.rlt=0.1",
    "--config.reward.weights.overlong=0.5",
    "--config.reward.overlong.soft_fraction=0.5",
    "--reward_fn=tests.reward_functions:count_words=0.1",
    "--config.loop.num_steps=2",
    "--config.loop.log_every=1",
    *(
      f"--config.sampling.{phase}.max_completion_tokens=8"
      for phase in ("probe", "baseline", "teach", "solve")
    ),
  ]

  logged = _run(flags, workdir)
  rows = [json.loads(line) for line in logged.splitlines()]
  assert [row["step"] for row in rows if "reward" in row] == [1, 2]
  named = ("teaching", "rlt", "overlong", "tests.reward_functions:count_words")
  assert {f"rewards/{name}" for name in named} <= set(rows[0])
  assert rows[0]["rewards/unavailable"] == 0
  assert "eval/teaching/NDR" in rows[-1]
  assert (workdir / "export/model.safetensors").exists()
  card = (workdir / "export/README.md").read_text()
  facts = dict(re.findall(r"(?m)^- ([\w ]+): (.+)$", card))
  assert facts["Base model"] == f"{tmp_path}/policy"
  assert facts["Recipe"] == "GRPO"
  assert "rlt" in facts["Reward"]
  assert re.fullmatch("[0-9a-f]{64}", facts["Data fingerprint"])
  evaluated = rows[-1]["eval/teaching/NDR"]
  assert f"| eval/teaching/NDR | 2 | {evaluated:.6g} |" in card
  assert (workdir / "checkpoints/2/manifest.json").exists()
  assert _run(flags, workdir) == logged


@pytest.mark.slow
def test_rlvr_trains_without_a_student(tmp_path):
  tiny.write_talker(tmp_path / "policy", max_position_embeddings=512)
  questions = _write_questions(tmp_path)
  flags = [
    "--config=configs/run/rlvr.py:smoke,dapo",
    f"--workdir={tmp_path}/run",
    "--config.world.directory=",
    f"--config.model.path={tmp_path}/policy",
    f"--config.data.path={questions}",
    "--config.held_out.path=",
    "--config.held_out.fraction=0.3",
    "--config.batch.num_questions=2",
    "--config.sampling.teach.group_size=3",
    "--config.sampling.teach.max_completion_tokens=8",
    "--reward_fn=tests.reward_functions:plain",
    "--config.loop.num_steps=1",
  ]

  shown = processes.succeed(processes.Job("train_grpo", flags))
  logged = (tmp_path / "run/metrics.jsonl").read_text()

  row, evaluated = map(json.loads, logged.splitlines())
  assert {"reward", "rewards/exact", "accuracy"} <= row.keys()
  assert "Reward exact is 0 for all 6 completions" in shown
  assert row["num_tokens"] > 0
  assert row["rewards/unavailable"] == 2
  assert evaluated["eval/accuracy_high"] > 0
  assert (tmp_path / "run/export/model.safetensors").exists()


@pytest.mark.slow
def test_training_and_sampling_start_from_saved_adapters(tmp_path):
  tiny.write_talker(
    tmp_path / "policy", num_hidden_layers=1, max_position_embeddings=512
  )
  questions = _write_questions(tmp_path)

  def run(workdir, *options):
    flags = [
      "--config=configs/run/rlvr.py:smoke",
      f"--workdir={workdir}",
      "--config.world.directory=",
      f"--config.model.path={tmp_path}/policy",
      f"--config.data.path={questions}",
      "--config.held_out.path=",
      "--config.batch.num_questions=2",
      "--config.batch.mask_truncated=False",
      "--config.sampling.teach.group_size=4",
      "--config.sampling.teach.max_completion_tokens=8",
      "--config.reward.weights.exact=0.0",
      "--reward_fn=tests.reward_functions:plain",
      "--config.lora.rank=4",
      "--config.reference.sync_every=0",
      "--config.loop.num_steps=2",
      "--config.loop.log_every=1",
      *options,
    ]
    lines = _run(flags, workdir).splitlines()
    return [json.loads(line) for line in lines]

  # A large learning rate, so sampling from the base alone would be detected.
  run(tmp_path / "first", "--config.schedule.learning_rate=0.05")
  rows = run(
    tmp_path / "more",
    f"--config.lora.path={tmp_path}/first/adapter",
    "--config.agreement.max_prob_error=1.0001",
  )
  errors = [r["rollout/prob_error"] for r in rows if "rollout/prob_error" in r]
  assert len(errors) == 2
