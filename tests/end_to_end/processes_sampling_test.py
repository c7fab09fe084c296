# SPDX-License-Identifier: Apache-2.0
"""Tests that sampling and training on two processes match one process."""

import functools
import json

import pytest

from tests import processes, tiny

_NUM_STEPS = 2
_NUM_TOKENS = 16


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """Returns a directory with two models and data."""
  home = tmp_path_factory.mktemp("home")
  for name in ("policy", "student"):
    tiny.write_talker(home / name, num_hidden_layers=1)
  rows = [
    {"question": f"{i} + {i}?", "answer": str(2 * i), "solution": f"= {2 * i}."}
    for i in range(6)
  ]
  (home / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
  return home


def _models(home):
  phases = ("probe", "baseline", "teach", "solve")
  return {
    "world.directory": "",
    "mesh.fsdp": 4,
    "model.path": home / "policy",
    "student.path": home / "student",
    "data.path": home / "data.jsonl",
    **{f"sampling.{p}.max_completion_tokens": _NUM_TOKENS for p in phases},
  }


def _train(home, workdir, *options, num_devices, guarded=False):
  """Starts GRPO with distinct rewards, some computed by the student."""
  settings = {
    **_models(home),
    "held_out.path": "",
    "held_out.fraction": 0.34,
    "evaluation.num_questions": 2,
    "batch.num_questions": 4,
    "batch.mask_truncated": False,
    "sampling.teach.group_size": 4,
    "reward.weights.teaching": 0.0,
    "reward.weights.rlt": 1.0,
    "reference.sync_every": 1,
    "schedule.learning_rate": 1e-3,
    "loop.num_steps": _NUM_STEPS,
    "loop.log_every": 1,
    "loop.eval_every": 0,
  }
  return processes.start(
    "train_grpo",
    "teacher_rcl",
    settings,
    f"--workdir={workdir}",
    *options,
    "--reward_fn=tests.reward_functions:count_words=0.1",
    num_devices=num_devices,
    guarded=guarded,
  )


def _check_equal(workdir, expected):
  processes.check_equal_exports(workdir, expected)
  losses = processes.check_equal_metrics(
    workdir,
    expected,
    "loss",
    "reward",
    "kl",
    "rewards/rlt",
    "completion_length",
    "eval/teaching/accuracy",
    "groups/used_fraction",
  )
  assert len(losses) > 5 * _NUM_STEPS


@pytest.fixture(scope="module")
def alone(home, tmp_path_factory):
  """Returns the workdir of a run on one process."""
  workdir = tmp_path_factory.mktemp("alone")
  processes.succeed(_train(home, workdir, num_devices=4))
  return workdir


@pytest.mark.slow
def test_two_processes_train_like_one(home, alone, tmp_path):
  start = functools.partial(_train, home, tmp_path)
  # Both take part in the dry pass, which changes nothing.
  with processes.pair(start, "--config.dry_pass=True") as pair:
    texts = [processes.succeed(process) for process in pair]
  assert ["Dry pass of row" in text for text in texts] == [True, False]
  _check_equal(tmp_path, alone)


@pytest.mark.slow
def test_two_processes_with_servers_train_like_one_without(
  home, alone, tmp_path
):
  servers = {
    role: processes.Server(role, home / role) for role in ("policy", "student")
  }
  try:
    for server in servers.values():
      server.wait()
    options = [
      "--config.rollout.backend=http",
      f"--config.rollout.weights_root={tmp_path}/weights",
      *(
        f"--config.rollout.{role}_urls=('{server.url}',)"
        for role, server in servers.items()
      ),
    ]
    start = functools.partial(_train, home, tmp_path / "run")
    with processes.pair(start, *options) as pair:
      first, second = map(processes.succeed, pair)
  finally:
    for server in servers.values():
      server.stop()
  _check_equal(tmp_path / "run", alone)
  # Only the first process sends requests; both push their shards.
  assert f"Pushed weights version={_NUM_STEPS} to 1 of 1 servers" in first
  assert "Pushed weights" not in second
  assert not list((tmp_path / "weights").iterdir())


@pytest.mark.slow
def test_a_missing_server_stops_both_processes(home, tmp_path):
  nowhere = f"('http://127.0.0.1:{processes.free_port()}',)"
  options = [
    "--config.rollout.backend=http",
    "--config.rollout.wait_s=1",
    f"--config.rollout.policy_urls={nowhere}",
    f"--config.rollout.student_urls={nowhere}",
    f"--config.rollout.weights_root={tmp_path}/weights",
  ]
  start = functools.partial(_train, home, tmp_path / "run", guarded=True)
  with processes.pair(start, *options) as pair:
    ends = [processes.end(process) for process in pair]
  assert [code for code, _ in ends] == [6, 8], ends
  assert "No rollout server is available for the policy" in ends[0][1]
  assert "Process 0 failed during policy" in ends[1][1]


@pytest.mark.slow
def test_two_processes_distil_like_one(home, tmp_path):
  def distil(workdir, *options, num_devices):
    settings = {
      "world.directory": "",
      "mesh.fsdp": 4,
      "model.path": home / "policy",
      "teacher.path": home / "student",
      "data.path": home / "data.jsonl",
      "held_out.fraction": 0.3,
      "num_epochs": 0,
      "batch.num_prompts": 4,
      "completions.on_policy_fraction": 1.0,
      "sampling.complete.max_completion_tokens": _NUM_TOKENS,
      "loop.num_steps": _NUM_STEPS,
      "loop.log_every": 1,
      "loop.eval_every": 0,
    }
    return processes.start(
      "train_gkd",
      "teacher_gkd",
      settings,
      f"--workdir={tmp_path / workdir}",
      *options,
      num_devices=num_devices,
      guarded=False,
    )

  processes.succeed(distil("one", num_devices=4))
  with processes.pair(functools.partial(distil, "two")) as pair:
    for process in pair:
      processes.succeed(process)
  processes.check_equal_exports(tmp_path / "two", tmp_path / "one")
  losses = processes.check_equal_metrics(
    tmp_path / "two", tmp_path / "one", "loss", "eval/loss"
  )
  assert len(losses) == _NUM_STEPS + 1


@pytest.mark.slow
def test_two_processes_evaluate_like_one_and_resume_its_records(home, tmp_path):
  def evaluate(workdir, *options, num_devices):
    settings = {**_models(home), "batch_size": 4, "num_bootstrap": 10}
    return processes.start(
      "evaluate",
      "teaching_eval",
      settings,
      f"--workdir={tmp_path / workdir}",
      *options,
      num_devices=num_devices,
      guarded=False,
    )

  processes.succeed(evaluate("one", num_devices=4))
  lines = (tmp_path / "one/records.jsonl").read_text().splitlines(True)
  assert len(lines) == 1 + 6

  (tmp_path / "two").mkdir()
  (tmp_path / "two/records.jsonl").write_text("".join(lines[:4]))
  start = functools.partial(evaluate, "two")
  with processes.pair(start) as pair:
    first, second = map(processes.succeed, pair)
  assert "Resuming evaluation: 3 of 6 questions" in first
  one, two = (
    json.loads((tmp_path / name / "summary.json").read_text())["all"]
    for name in ("one", "two")
  )
  assert one | {"teaching/seconds": 0.0} == two | {"teaching/seconds": 0.0}
  assert "| student taught" in first
  assert "| student taught" not in second


# Broadcasts values of several sizes, then fails.
_BROADCASTER = """
import sys
from atlas_jax import distributed, errors
import orbax.checkpoint as ocp

address, count, index = sys.argv[1:]
distributed.initialize(
  distributed.Address(address, int(count), int(index)),
  max_wait_s=60,
  max_silence_s=60,
)
from_first = distributed.FirstProcessBroadcast("test")
long = [i * 1e-7 for i in range(500_000)]  # Exceeds one message.
assert from_first(lambda: long) == long
assert [from_first(lambda: int(index) + i) for i in range(3)] == [0, 1, 2]
client = ocp.multihost.get_jax_distributed_client()
distributed.wait("broadcasts done")
left = client.key_value_dir_get_bytes("test/")
distributed.wait("keys read")
try:
  from_first(lambda: 1 // int(index))
except (ZeroDivisionError, errors.LostProcessError) as error:
  print(type(error).__name__, left)
"""


@pytest.mark.slow
def test_results_and_errors_of_the_first_process_reach_all():
  address = f"127.0.0.1:{processes.free_port()}"
  pair = [
    processes.run_code(_BROADCASTER, address, "2", str(index))
    for index in range(2)
  ]
  first, second = map(processes.succeed, pair)
  assert "ZeroDivisionError []" in first  # The store keeps no keys.
  assert "LostProcessError []" in second
