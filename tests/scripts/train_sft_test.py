# SPDX-License-Identifier: Apache-2.0
"""Tests SFT from the command line: bad input, signals, kills and exports."""

import hashlib
import json
import re
import signal
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests import processes, tiny

_NUM_STEPS = 400


@pytest.fixture(scope="module")
def command(tmp_path_factory):
  """Returns the flags of the command without its workdir."""
  directory = tmp_path_factory.mktemp("sft")
  tiny.write_talker(directory / "model", num_hidden_layers=1)
  rows = [
    {"question": f"What is {i} + {i}?", "solution": f"It is {2 * i}."}
    for i in range(40)
  ]
  path = directory / "data.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return [
    "--config=configs/run/teacher_sft.py:smoke",
    "--config.world.directory=",
    f"--config.model.path={directory}/model",
    f"--config.data.path={path}",
    "--config.packing.length=64",
    "--config.batch.size=4",
    "--config.num_epochs=0",
    f"--config.loop.num_steps={_NUM_STEPS}",
    "--config.loop.log_every=1",
    "--config.loop.save_every=1000",
  ]


def _start(command, *more):
  return processes.Job("train_sft", [*command, *more], split=True)


def _finish(command, *more):
  process = _start(command, *more)
  _, stderr = process.communicate(timeout=300)
  return process.returncode, stderr


def _rows(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def _stop_after(process, workdir, num_steps, number):
  """Sends a signal once `num_steps` are logged; returns stderr."""
  deadline = time.monotonic() + 240
  path = workdir / "metrics.jsonl"
  while not path.exists() or path.read_text().count("\n") < num_steps:
    assert process.poll() is None, process.read()
    assert time.monotonic() < deadline
    time.sleep(0.02)
  process.send_signal(number)
  _, stderr = process.communicate(timeout=120)
  return stderr


@pytest.mark.slow
def test_the_same_command_resumes_after_either_signal(command, tmp_path):
  workdir = tmp_path / "run"
  line = [*command, f"--workdir={workdir}"]
  logged = 0
  for number in (signal.SIGTERM, signal.SIGINT):
    process = _start(line)
    stderr = _stop_after(process, workdir, logged + 3, number)
    assert process.returncode == 75, stderr
    assert f"Got {number.name}; saving after this step." in stderr
    assert "Run the same command again" in stderr
    assert "Traceback" not in stderr
    steps = [row["step"] for row in _rows(workdir)]
    assert steps == list(range(1, len(steps) + 1))
    logged = len(steps)
    assert (workdir / "checkpoints" / str(logged)).exists()
    assert not (workdir / "export").exists()

  code, stderr = _finish(line)
  assert code == 0, stderr
  assert "Resuming from step" in stderr
  rows = _rows(workdir)
  losses = [row["loss"] for row in rows if "loss" in row]
  assert [r["step"] for r in rows if "loss" in r] == [*range(1, _NUM_STEPS + 1)]
  assert losses[-1] < losses[0]
  assert "eval/loss" in rows[-1]
  assert (workdir / "export/model.safetensors").exists()


def _digest(checkpoint):
  """Returns a digest of all arrays of a checkpoint."""
  state = ocp.StandardCheckpointer().restore(checkpoint.absolute() / "state")
  digest = hashlib.sha256()
  for path, leaf in jax.tree.leaves_with_path(state):
    digest.update(jax.tree_util.keystr(path).encode())
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()


@pytest.mark.slow
def test_a_run_killed_between_saves_resumes_bit_for_bit(command, tmp_path):
  # The 36 training conversations fill fewer than 30 batches, so a new epoch
  # with another order begins after the kill.
  line = [
    *command,
    "--config.packing.packed=False",
    "--config.loop.num_steps=30",
    "--config.loop.save_every=8",
    "--config.loop.eval_every=10",
    "--config.checkpoint.keep=9",
    "--config.export.keep_steps=2",
  ]
  straight, killed = tmp_path / "straight", tmp_path / "killed"
  code, stderr = _finish(line, f"--workdir={straight}")
  assert code == 0, stderr
  process = _start(line, f"--workdir={killed}")
  _stop_after(process, killed, 13, signal.SIGKILL)
  assert process.returncode == -signal.SIGKILL
  assert not (killed / "checkpoints/30").exists()
  code, stderr = _finish(line, f"--workdir={killed}")
  assert code == 0, stderr
  assert re.search(r"Resuming from step=\d+, saved 0 minutes ago", stderr)

  def logged(workdir):
    names = ("step", "loss", "grad_norm", "learning_rate", "eval/loss")
    return [[row.get(name) for name in names] for row in _rows(workdir)]

  assert logged(killed) == logged(straight)
  for step in (16, 24, 30):
    digests = [
      _digest(run / f"checkpoints/{step}") for run in (straight, killed)
    ]
    assert digests[0] == digests[1]
  for run in (straight, killed):
    assert sorted(path.name for path in run.glob("export*")) == [
      "export",
      "export-24",
      "export-30",
    ]
  model = "export/model.safetensors"
  assert (killed / model).read_bytes() == (straight / model).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
  ("change", "code", "logged"),
  [
    ("--config.batch.sise=4", 2, 'Did you mean "size"'),
    ("--config.optimizer.lion.beta1=0.8", 2, "optimizer.name is adamw"),
    ("--config.batch.per_device=3", 2, "--config.batch.per_device=3"),
    ("--config=configs/run/none.py", 2, "configs/run/none.py"),
    ("--config.mesh.tensor=3", 2, "--config.mesh"),
    ("--config.packing.length=9999", 2, "max_position_embeddings"),
    ("--config.data.path=none.jsonl", 3, "none.jsonl"),
    ("--config.model.path=configs", 5, "configs/config.json"),
  ],
)
def test_invalid_input_is_reported_in_four_lines(
  command, tmp_path, change, code, logged
):
  workdir = tmp_path / "run"
  found, stderr = _finish(command, f"--workdir={workdir}", change)
  assert found == code, stderr
  assert logged in stderr
  for part in ("  where: ", "  why  : ", "  fix  : "):
    assert part in stderr
  assert "Traceback" not in stderr
  left = {path.name for path in workdir.iterdir()} if workdir.exists() else ()
  assert set(left) <= {"config.json", "lock"}
