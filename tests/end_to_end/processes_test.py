# SPDX-License-Identifier: Apache-2.0
"""Two processes train as one does, and one does not outlive the other."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors import numpy as safetensors

from tests import tiny

_ROOT = pathlib.Path(__file__).parents[2]
_NUM_STEPS = 4
_MAX_S = 300


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """Gives a folder with a model and data."""
  home = tmp_path_factory.mktemp("home")
  tiny.write_talker(home / "model", num_hidden_layers=1)
  rows = [
    {"question": f"{i} + {i}?", "solution": f"It is {2 * i}."} for i in range(9)
  ]
  (home / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
  return home


def _start(home, workdir, *options, num_devices):
  """Starts a training on so many devices of its own."""
  command = [sys.executable, "-m", "scripts.train_sft"]
  settings = {
    "world.directory": "",
    "model.path": home / "model",
    "data.path": home / "data.jsonl",
    "held_out.fraction": 0.3,
    "packing.packed": False,
    "batch.size": 4,
    "num_epochs": 0.0,
    "loop.num_steps": _NUM_STEPS,
    "loop.log_every": 1,
    "loop.eval_every": 2,
    "loop.save_every": 2,
    # As long a run as it may be, its first steps are the same.
    "schedule.schedule": "constant",
    "schedule.warmup_fraction": 0.0,
  }
  words = [f"--config.{key}={value}" for key, value in settings.items()]
  recipe = f"--config={_ROOT}/configs/run/teacher_sft.py:smoke"
  flags = f"--xla_force_host_platform_device_count={num_devices}"
  return subprocess.Popen(
    [*command, recipe, f"--workdir={workdir}", *words, *options],
    cwd=_ROOT,
    env={**os.environ, "XLA_FLAGS": flags},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def _free_port():
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


@contextlib.contextmanager
def _pair(home, workdir, *options, of_second=()):
  """Starts two processes, on two devices each."""
  address = f"--coordinator_address=127.0.0.1:{_free_port()}"
  common = (*options, address, "--num_processes=2")
  extra = ((), tuple(of_second))
  pair = [
    _start(
      *(home, workdir, *common, f"--process_id={i}", *extra[i]), num_devices=2
    )
    for i in range(2)
  ]
  try:
    yield pair
  finally:
    for process in pair:
      process.kill()
      process.stdout.close()
      process.wait()


def _end(process):
  text, _ = process.communicate(timeout=_MAX_S)
  return process.returncode, text


def _losses(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  return [row["loss"] for row in rows if "loss" in row] + [
    row["eval/loss"] for row in rows if "eval/loss" in row
  ]


def _check_equal(workdir, expected):
  """Compares losses, and the weights that were exported."""
  losses = _losses(workdir)
  assert losses == pytest.approx(_losses(expected), rel=1e-6)
  got, wanted = (
    safetensors.load_file(run / "export/model.safetensors")
    for run in (workdir, expected)
  )
  for name, weights in wanted.items():
    distance = np.linalg.norm(got[name] - weights)
    assert distance <= 1e-6 * np.linalg.norm(weights), name
  return losses


@pytest.mark.slow
def test_two_processes_train_as_one_does_and_resume_as_one(home, tmp_path):
  mesh = ("--config.mesh.fsdp=2", "--config.mesh.context=2")

  def train_alone(run, *options):
    code, text = _end(_start(home, tmp_path / run, *options, num_devices=4))
    assert code == 0, text
    return text

  train_alone("one", *mesh)
  with _pair(home, tmp_path / "two", *mesh) as pair:
    for process in pair:
      code, text = _end(process)
      assert code == 0, text
  assert len(_check_equal(tmp_path / "two", tmp_path / "one")) == _NUM_STEPS + 2

  more = f"--config.loop.num_steps={_NUM_STEPS + 2}"
  train_alone("one", *mesh, more)
  text = train_alone("two", "--config.mesh.fsdp=4", more)
  assert f"Resuming from step {_NUM_STEPS}" in text
  assert len(_check_equal(tmp_path / "two", tmp_path / "one")) == _NUM_STEPS + 5


def _child(pid):
  """Finds the process that trains: the child of the guard of a launcher."""
  for _ in range(2):
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text()
    (pid,) = map(int, children.split())
  return pid


@contextlib.contextmanager
def _long_run(home, workdir):
  """Starts two processes, and lets them do a few steps."""
  options = ("--config.loop.num_steps=100000", "--max_process_silence_s=10")
  with _pair(home, workdir, *options) as pair:
    deadline = time.monotonic() + _MAX_S
    while not (workdir / "checkpoints/2").exists():
      assert pair[0].poll() is None, pair[0].stdout.read()
      assert time.monotonic() < deadline
      time.sleep(0.2)
    yield pair


@pytest.mark.slow
def test_one_process_does_not_outlive_the_other(home, tmp_path):
  with _long_run(home, tmp_path) as (first, second):
    os.kill(_child(second.pid), signal.SIGKILL)
    killed_at = time.monotonic()
    code, text = _end(first)
    assert code == 8, text
    assert time.monotonic() - killed_at < 60
    # By an error of the collective, or else by an abort for its silence.
    assert "Look at the end of the other processes' logs" in text
    code, text = _end(second)
    assert code == 70
    assert "killed by SIGKILL" in text


@pytest.mark.slow
def test_both_processes_stop_at_one_step_when_one_is_asked(home, tmp_path):
  with _long_run(home, tmp_path) as pair:
    pair[1].terminate()
    ends = [_end(process) for process in pair]
  steps = [
    re.search(r"Stopped on request after step (\d+)", t) for _, t in ends
  ]
  assert [code for code, _ in ends] == [75, 75], ends
  assert steps[0][1] == steps[1][1]
  assert (tmp_path / "checkpoints" / steps[0][1] / "manifest.json").exists()


@pytest.mark.slow
def test_processes_of_different_jobs_are_refused(home, tmp_path):
  with _pair(home, tmp_path / "run", of_second=["--config.seed=1"]) as pair:
    for process in pair:
      code, text = _end(process)
      assert code == 2, text
      assert "seed: 42 (process 0); 1 (process 1)" in text
