# SPDX-License-Identifier: Apache-2.0
"""Tests that SFT on two processes matches one, and that both stop together."""

import contextlib
import filecmp
import functools
import json
import os
import pathlib
import re
import signal
import time

import pytest

from conversion import card, save, weights
from tests import processes, tiny

_NUM_STEPS = 4


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """Returns a directory with a model and data, and the model."""
  home = tmp_path_factory.mktemp("home")
  model, _ = tiny.write_talker(home / "model", num_hidden_layers=1)
  rows = [
    {"question": f"{i} + {i}?", "solution": f"It is {2 * i}."} for i in range(9)
  ]
  (home / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
  return home, model


@pytest.fixture(scope="module")
def home(written):
  return written[0]


def _start(home, workdir, *options, num_devices, guarded=False):
  """Starts SFT on `num_devices` simulated devices."""
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
    # The first steps must not depend on the number of steps.
    "schedule.schedule": "constant",
    "schedule.warmup_fraction": 0.0,
  }
  return processes.start(
    "train_sft",
    "teacher_sft",
    settings,
    f"--workdir={workdir}",
    *options,
    num_devices=num_devices,
    guarded=guarded,
  )


def _pair(home, workdir, *options, of_second=(), guarded=False):
  start = functools.partial(_start, home, workdir, guarded=guarded)
  return processes.pair(start, *options, of_second=of_second)


def _check_equal(workdir, expected):
  processes.check_equal_exports(workdir, expected)
  return processes.check_equal_metrics(workdir, expected, "loss", "eval/loss")


@pytest.mark.slow
def test_two_processes_train_and_resume_like_one(written, tmp_path):
  home, model = written
  mesh = ("--config.mesh.fsdp=2", "--config.mesh.context=2")
  small = "--config.export.max_shard_bytes=20000"

  def train_alone(run, *options):
    return processes.succeed(
      _start(home, tmp_path / run, *options, num_devices=4)
    )

  more = f"--config.loop.num_steps={_NUM_STEPS + 2}"
  train_alone("one", *mesh, more)
  with _pair(home, tmp_path / "two", *mesh, small) as pair:
    for process in pair:
      code, text = processes.end(process)
      assert code == 0, text
      written, total = re.search(r"Wrote (\d+) of (\d+) files", text).groups()
      assert 0 < int(written) < int(total)
      assert "largest difference of logits" in text
  # The export of two processes, and the checkpoint of one at the same step.
  step = tmp_path / "one/checkpoints" / str(_NUM_STEPS)
  processes.check_equal_weights(
    weights.of_directory(tmp_path / "two/export"), weights.of_step(step, model)
  )

  text = train_alone("two", "--config.mesh.fsdp=4", more)
  assert f"Resuming from step={_NUM_STEPS}" in text
  assert len(_check_equal(tmp_path / "two", tmp_path / "one")) == _NUM_STEPS + 5


# Loads a model onto the devices of all processes and exports it.
_EXPORTER = """
import pathlib, sys
from atlas_jax import distributed, sharding
from scripts.job import components
from conversion import card, save
from conversion import process_group
from scripts.bench import memory

model, out, address, count, index = sys.argv[1:]
address = distributed.Address(address, int(count), int(index))
distributed.initialize(address, max_wait_s=60, max_silence_s=60)
opened = components.open_model(
  sharding.make_mesh(data=1, fsdp=-1, tensor=1),
  path=model,
  dtype="float32",
  param_dtype="float32",
  attention="xla",
  remat="none",
  unroll=1,
)
with distributed.together():
  held = memory.of_process("VmRSS", reset=True)
  save.save(
    pathlib.Path(out),
    opened.params,
    opened.model,
    source=opened.directory,
    dtype="float32",
    max_shard_bytes=3 * 10**7,
    about=card.Card(base="test"),
    overwrite=False,
    share=process_group.ProcessShare(
      int(index), int(count), distributed.exchange
    ),
  )
  print("grew by", memory.of_process("VmHWM", reset=False) - held)
"""


@pytest.mark.slow
def test_export_memory_per_process_is_below_half_the_model(tmp_path):
  sizes = {"hidden_size": 512, "intermediate_size": 2048, "head_dim": 64}
  sizes |= {"num_attention_heads": 8, "num_key_value_heads": 8}
  model, params = tiny.write_talker(
    tmp_path / "model", num_hidden_layers=24, **sizes
  )
  arguments = (tmp_path / "model", tmp_path / "many")
  address = f"127.0.0.1:{processes.free_port()}"
  pair = [
    processes.run_code(_EXPORTER, *arguments, address, "2", str(index))
    for index in range(2)
  ]
  ends = [processes.end(process) for process in pair]
  num_bytes = save.num_bytes(model, "float32")
  for code, text in ends:
    assert code == 0, text
    assert int(re.search(r"grew by (\d+)", text)[1]) < num_bytes / 2

  save.save(
    tmp_path / "one",
    params,
    model,
    source=tmp_path / "model",
    dtype="float32",
    max_shard_bytes=3 * 10**7,
    about=card.Card(base="test"),
    overwrite=False,
  )
  names = [path.name for path in (tmp_path / "one").iterdir()]
  same, different, odd = filecmp.cmpfiles(
    tmp_path / "one", tmp_path / "many", names, shallow=False
  )
  assert (different, odd) == ([], [])
  assert len(same) > 10


def _child(pid):
  """Returns the pid of the trainer: the launcher's grandchild."""
  for _ in range(2):
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text()
    (pid,) = map(int, children.split())
  return pid


@contextlib.contextmanager
def _long_run(home, workdir):
  """Starts two processes and waits until they have saved step 2."""
  options = ("--config.loop.num_steps=100000", "--max_process_silence_s=10")
  with _pair(home, workdir, *options, guarded=True) as pair:
    deadline = time.monotonic() + processes.MAX_S
    while not (workdir / "checkpoints/2").exists():
      assert pair[0].poll() is None, pair[0].read()
      assert time.monotonic() < deadline
      time.sleep(0.2)
    yield pair


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])  # 0 is the coordinator.
def test_killing_one_process_stops_the_other(home, tmp_path, killed):
  with _long_run(home, tmp_path) as pair:
    gone, left = pair[killed], pair[1 - killed]
    os.kill(_child(gone.pid), signal.SIGKILL)
    killed_at = time.monotonic()
    code, text = processes.end(left)
    assert code == 8, text
    assert time.monotonic() - killed_at < 60
    # Either the collective fails, or the heartbeat timeout aborts it.
    assert "the end of the other processes' logs" in text
    code, text = processes.end(gone)
    assert code == 70
    assert "killed by SIGKILL" in text


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_at_the_same_step(home, tmp_path):
  with _long_run(home, tmp_path) as pair:
    pair[1].terminate()
    ends = [processes.end(process) for process in pair]
  steps = [
    re.search(r"Stopped on request after step (\d+)", t) for _, t in ends
  ]
  assert [code for code, _ in ends] == [75, 75], ends
  assert steps[0][1] == steps[1][1]
  assert (tmp_path / "checkpoints" / steps[0][1] / "manifest.json").exists()


@pytest.mark.slow
def test_processes_with_different_configs_exit_with_code_2(home, tmp_path):
  with _pair(home, tmp_path / "run", of_second=["--config.seed=1"]) as pair:
    for process in pair:
      code, text = processes.end(process)
      assert code == 2, text
      assert "seed: 42 (process 0); 1 (process 1)" in text
