# SPDX-License-Identifier: Apache-2.0
"""Tests that failing jobs report the first error and leave no process."""

import json
import pathlib
import subprocess
import sys
import uuid

import pytest

from atlas_jax import checkpoint_format
from tests import processes, tiny

_ROOT = pathlib.Path(__file__).parents[2]
_MARK = "ATLAS_JAX_TEST"
_LONG = 2**18  # Row length whose attention scores fit no machine.
_MAX_KB = 256 * 2**20  # Limits machines that overcommit memory.


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """Returns a directory with a model, and data for both recipes."""
  home = tmp_path_factory.mktemp("home")
  tiny.write_talker(
    home / "model", num_hidden_layers=1, max_position_embeddings=_LONG
  )
  rows = [
    {"question": f"{i} + {i}?", "answer": str(2 * i), "solution": f"{2 * i}."}
    for i in range(9)
  ]
  (home / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
  return home


def _flags(home, workdir, recipe, **settings):
  common = {
    "world.directory": "",
    "model.path": home / "model",
    "data.path": home / "data.jsonl",
    "held_out.fraction": 0.3,
    "loop.save_every": 1,
    **settings,
  }
  words = [f"--config.{key}={value}" for key, value in common.items()]
  config = f"--config={_ROOT}/configs/run/{recipe}.py:smoke"
  return [config, f"--workdir={workdir}", *words]


def _run(command, **environment):
  """Returns exit code, stderr and pids of surviving children."""
  mark = uuid.uuid4().hex
  child = subprocess.run(
    command,
    cwd=_ROOT,
    env={**processes.ENVIRONMENT, _MARK: mark, **environment},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  return child.returncode, child.stderr, _marked(mark)


def _marked(mark):
  """Returns the pids of processes with `mark` in their environment."""
  found = []
  for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
    try:
      if f"{_MARK}={mark}".encode() in path.read_bytes():
        found.append(path.parent.name)
    except OSError:  # It has exited, or belongs to another user.
      continue
  return found


# Fails while the reward function runs in a separate process, the next batch is
# sampled in a thread, a tracker has its thread, and a save may be in progress.
_FAILS = """
import os, sys
from scripts import program, train_grpo
from atlas_jax.train import grpo_update
from tests.end_to_end import faults_test

update, calls = grpo_update.GrpoUpdate.update, []

def fail(*args, **kwargs):
  calls.append(args)
  if len(calls) == 2:
    mark = os.environ[faults_test._MARK]
    print("processes:", len(faults_test._marked(mark)), file=sys.stderr)
    raise ZeroDivisionError("of the trainer")
  return update(*args, **kwargs)

grpo_update.GrpoUpdate.update = fail
program.run(train_grpo.main)
"""
_BUSY = {
  "held_out.path": "",
  "batch.num_questions": 2,
  "sampling.teach.group_size": 2,
  "sampling.teach.max_completion_tokens": 8,
  "batch.mask_truncated": False,
  "groups.filter_equal": False,
  "overlap.max_staleness": 1,
  "agreement.every_steps": 20,
  "report.to": "tensorboard",
  "loop.num_steps": 9,
}
_FUNCTION = "--reward_fn=tests.reward_functions:count_words"


@pytest.mark.slow
def test_a_training_error_is_reported_first_and_leaves_no_process(
  home, tmp_path
):
  flags = _flags(home, tmp_path / "run", "rlvr", **_BUSY)
  command = [sys.executable, "-c", _FAILS, *flags, _FUNCTION]
  code, logged, left = _run(command)
  assert code == 70, logged
  assert left == []
  # The trainer and the reward function.
  assert "processes: 2" in logged
  first = logged[logged.index("Traceback") :]
  assert first.count("Traceback") == 1
  assert first.rstrip().endswith("ZeroDivisionError: of the trainer")
  assert checkpoint_format.damage(tmp_path / "run/checkpoints/1") == ""


@pytest.mark.slow
def test_a_job_that_fails_at_startup_leaves_no_process(home, tmp_path):
  settings = {**_BUSY, "advantages.scale": "median"}
  flags = _flags(home, tmp_path / "run", "rlvr", **settings)
  command = [sys.executable, "-m", "scripts.train_grpo", *flags, _FUNCTION]
  code, logged, left = _run(command)
  assert code == 2, logged
  assert left == []
  assert "Traceback" not in logged
  assert "scale=median" in logged


@pytest.mark.slow
def test_out_of_memory_suggests_fixes_and_keeps_the_checkpoint(home, tmp_path):
  def flags(num_steps):
    settings = {
      "packing.packed": False,
      "packing.length": 64,
      "batch.size": 2,
      "num_epochs": 0,
      "loop.num_steps": num_steps,
      "export.enabled": False,
    }
    return _flags(home, tmp_path / "run", "teacher_sft", **settings)

  processes.succeed(processes.Job("train_sft", flags(1)))
  # Attention scores for all pairs of tokens take two terabytes.
  too_long = (
    f"--config.packing.length={_LONG}",
    "--config.model.attention=reference",
    "--config.checkpoint.allow_changed=data",
  )
  limited = f'ulimit -v {_MAX_KB}; exec "$@"'
  script = [sys.executable, "-m", "scripts.train_sft", *flags(2), *too_long]
  code, logged, left = _run(["bash", "-c", limited, "bash", *script])
  assert code == 70, logged
  assert left == []
  assert "Resuming from step=1" in logged
  assert "The device is out of memory." in logged
  assert "RESOURCE_EXHAUSTED" in logged
  assert "Use a smaller batch" in logged
  assert "Traceback" not in logged
  assert checkpoint_format.damage(tmp_path / "run/checkpoints/1") == ""


@pytest.mark.slow
def test_waiting_for_a_missing_process_of_a_cluster_times_out(home, tmp_path):
  # The environment Slurm sets for the first of three processes.
  job = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "3",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
  }
  flags = _flags(home, tmp_path / "run", "teacher_sft")
  script = [sys.executable, "-m", "scripts.train_sft"]
  code, logged, left = _run([*script, *flags, "--max_process_wait_s=3"], **job)
  assert code == 8, logged
  assert left == []
  assert "or never connects" in logged
  assert not (tmp_path / "run").exists()
