# SPDX-License-Identifier: Apache-2.0
"""Two processes train as one does, and one does not outlive the other."""

import contextlib
import json
import os
import pathlib
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


@pytest.mark.slow
def test_two_processes_train_as_one_does(home, tmp_path):
  mesh = ("--config.mesh.fsdp=2", "--config.mesh.context=2")
  code, text = _end(_start(home, tmp_path / "one", *mesh, num_devices=4))
  assert code == 0, text
  with _pair(home, tmp_path / "two", *mesh) as pair:
    for process in pair:
      code, text = _end(process)
      assert code == 0, text
  one, two = _losses(tmp_path / "one"), _losses(tmp_path / "two")
  assert len(two) == _NUM_STEPS + 2
  assert two == pytest.approx(one, rel=1e-6)
  exports = [
    safetensors.load_file(tmp_path / run / "export/model.safetensors")
    for run in ("one", "two")
  ]
  for name, expected in exports[0].items():
    distance = np.linalg.norm(exports[1][name] - expected)
    assert distance <= 1e-6 * np.linalg.norm(expected), name


def _child(pid):
  """Finds the process that trains: the child of the guard of a launcher."""
  for _ in range(2):
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text()
    (pid,) = map(int, children.split())
  return pid


@pytest.mark.slow
def test_one_process_does_not_outlive_the_other(home, tmp_path):
  options = ("--config.loop.num_steps=100000", "--max_process_silence_s=10")
  with _pair(home, tmp_path / "run", *options) as (first, second):
    deadline = time.monotonic() + _MAX_S
    while not (tmp_path / "run/checkpoints/2").exists():
      assert first.poll() is None, first.stdout.read()
      assert time.monotonic() < deadline
      time.sleep(0.2)
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
def test_processes_of_different_jobs_are_refused(home, tmp_path):
  with _pair(home, tmp_path / "run", of_second=["--config.seed=1"]) as pair:
    for process in pair:
      code, text = _end(process)
      assert code == 2, text
      assert "seed: 42 (process 0); 1 (process 1)" in text
