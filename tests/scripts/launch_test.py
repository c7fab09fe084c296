# SPDX-License-Identifier: Apache-2.0
"""Tests the launch scripts, from their command line to trained weights."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys

import pytest

from atlas_jax import errors
from rollout import supervisor
from tests import fakes, processes, tiny

_ROOT = pathlib.Path(__file__).parents[2]
_VLLM = _ROOT / ".venv-rollout/bin/python"
# vLLM's attention on a CPU requires a head width of at least 32.
_FIELDS = {
  "vocab_size": 300,
  "hidden_size": 64,
  "intermediate_size": 96,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 32,
  "max_position_embeddings": 512,
  "tie_word_embeddings": True,
}


_PYTHON = (sys.executable, "-m", "scripts.launch")


def _launch(*arguments, command=_PYTHON, timeout=60):
  return subprocess.run(
    [*command, *map(str, arguments)],
    cwd=_ROOT,
    env={
      **processes.ENVIRONMENT,
      "OMP_NUM_THREADS": "1",
      # vLLM skips compiling the function that ranks tokens; ranks are unused.
      "TORCHDYNAMO_DISABLE": "1",
    },
    capture_output=True,
    text=True,
    timeout=timeout,
    check=False,
  )


@pytest.mark.parametrize(
  ("script", "arguments", "expected"),
  [
    (
      "launch.sh",
      ["8", "configs/run/teacher_sft.yaml", "report_to=null"],
      "-m scripts.launch 8 configs/run/teacher_sft.yaml report_to=null",
    ),
    (
      "launch_with_server.sh",
      ["1", "3", "teacher_rcl", "dataset_id_or_path=a b"],
      "-m scripts.launch --num_servers=1 3 teacher_rcl dataset_id_or_path=a b",
    ),
  ],
)
def test_scripts_forward_their_arguments(tmp_path, script, arguments, expected):
  """Runs them in another directory, with an existing environment."""
  shutil.copytree(_ROOT / "scripts", tmp_path / "scripts")
  shutil.copytree(_ROOT / "requirements", tmp_path / "requirements")
  (tmp_path / ".venv/bin").mkdir(parents=True)
  shutil.copytree(_ROOT / "requirements", tmp_path / ".venv/installed")
  python = tmp_path / ".venv/bin/python"
  python.write_text('#!/bin/sh\necho "$@"\nexit 5\n')
  python.chmod(0o755)
  result = subprocess.run(
    ["bash", tmp_path / "scripts" / script, *arguments],
    cwd="/",
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  assert (result.stdout.strip(), result.returncode) == (expected, 5)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "number of devices, a recipe"),
    (["teacher_rcl"], "number of devices, a recipe"),
    (["0", "teacher_rcl:smoke"], "number of devices, a recipe"),
    (["--num_servers=", "1", "teacher_rcl"], "number of devices, a recipe"),
    (["1", "teacher_rcll"], "Did you mean teacher_rcl?"),
    (["1", "teacher_rcl:smoke", "max_step=4"], "Did you mean max_steps?"),
    (["--num_servers=1", "1", "teacher_sft:smoke"], "does not sample"),
    (
      ["--num_servers=1", "1", "teacher_rcl:smoke", "--rollout=sglang"],
      "Unknown rollout engine",
    ),
  ],
)
def test_invalid_arguments_exit_with_code_2(arguments, message):
  result = _launch(*arguments)
  assert result.returncode == 2, result.stderr
  assert message in result.stderr
  assert "Traceback" not in result.stderr


def test_a_port_in_use_exits_with_code_2_before_starting(tmp_path):
  with socket.socket() as holder:
    holder.bind(("127.0.0.1", 0))
    holder.listen()
    port = holder.getsockname()[1]
    result = _launch(
      "--num_servers=1",
      "1",
      "teacher_rcl:smoke",
      "--rollout=jax",
      f"vllm_port={port}",
      f"output_dir={tmp_path / 'run'}",
    )
  assert result.returncode == 2, result.stderr
  assert f"Port {port} is in use" in result.stderr
  assert "or set vllm_port=" in result.stderr
  assert not (tmp_path / "run").exists()


def _world(path):
  """Writes a teacher, a student and questions; returns overrides for them."""
  for name in ("teacher", "student"):
    tiny.write_checkpoint(path / name, "qwen3", **_FIELDS)
    fakes.write_tokenizer(path / name)
  questions = [
    {"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(8)
  ]
  for name, part in (("questions", questions[:6]), ("others", questions[6:])):
    text = "".join(json.dumps(question) + "\n" for question in part)
    (path / f"{name}.jsonl").write_text(text)
  return (
    "--config.world.directory=",
    f"model_name_or_path={path / 'teacher'}",
    f"student_model={path / 'student'}",
    f"dataset_id_or_path={path / 'questions.jsonl'}",
    f"--config.held_out.path={path / 'others.jsonl'}",
    "--config.model.unroll=1",
    "--config.student.unroll=1",
    "max_completion_length=12",
    "train_batch_size=16",
    "num_generations=4",
    "logging_steps=1",
  )


def _free_port(count):
  """Returns the first of `count` consecutive free ports."""
  while True:
    with socket.socket() as probe:
      probe.bind(("127.0.0.1", 0))
      port = probe.getsockname()[1]
    with contextlib.suppress(errors.ConfigError):
      supervisor.check_ports("127.0.0.1", port, count)
      return port


def _is_running(text):
  """Returns whether a process has this text in its command line."""
  for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    with contextlib.suppress(OSError):
      if os.fsencode(text) in path.read_bytes():
        return True
  return False


_SCRIPT = ("bash", "scripts/launch_with_server.sh")
_IS_INSTALLED = _VLLM.exists() and (_ROOT / ".venv/installed").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
  ("engine", "command", "num_ports", "num_of_policy"),
  [
    ("jax", (*_PYTHON, "--num_servers=3", "3"), 3, 2),
    pytest.param(
      "vllm",
      (*_SCRIPT, "1", "1"),
      2,
      1,
      marks=[
        pytest.mark.vllm,
        pytest.mark.skipif(
          not _IS_INSTALLED,
          reason="needs the environments that scripts/run_tests.sh creates",
        ),
      ],
    ),
  ],
)
def test_training_with_servers_finishes_every_step(
  tmp_path, engine, command, num_ports, num_of_policy
):
  port, run = _free_port(num_ports), tmp_path / "run"
  result = _launch(
    "configs/run/teacher_rcl.py:smoke",
    "report_to=null",
    "max_steps=2",
    "eval_steps=1",
    f"--rollout={engine}",
    f"vllm_port={port}",
    f"output_dir={run}",
    *_world(tmp_path),
    command=command,
    timeout=500,
  )
  logs = "".join(log.read_text() for log in run.glob("servers/*"))
  assert result.returncode == 0, result.stderr[-3000:] + logs[-3000:]
  rows = [
    json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()
  ]
  assert [r["step"] for r in rows if "reward" in r] == [1, 2]
  assert [r["step"] for r in rows if "eval/teaching/NDR" in r] == [1, 2]
  measured = {f"policy_{name}_s" for name in ("push", "publish", "drain")}
  measured |= {"policy_load_s", "policy_queue_s", "policy_tokens_per_s"}
  for name in (*measured, "student_queue_s", "student_tokens_per_s"):
    assert all(f"rollout/{name}" in row for row in rows if "reward" in row)
  assert (run / "export/model.safetensors").exists()
  pushed = f"version=2 to {num_of_policy} of {num_of_policy} servers"
  assert pushed in result.stderr
  # The launcher and training log in one format.
  for event in ("Training: ", "Devices: "):
    assert re.search(rf"(?m)^\d\d:\d\d:\d\d {event}", result.stderr)
  # Every server got the launcher's token, and nothing else is left of it.
  assert logs.count("token=required") == num_ports
  assert len(list(run.glob("servers/*"))) == num_ports
  supervisor.check_ports("127.0.0.1", port, num_ports)
  assert not _is_running(str(tmp_path))
