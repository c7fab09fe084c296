# SPDX-License-Identifier: Apache-2.0
"""Tests starting and stopping the server from the command line."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import httpx2
import pytest

from tests import fakes, processes, tiny

_ROOT = pathlib.Path(__file__).parents[2]


def _command(*options):
  return [sys.executable, "-m", "scripts.serve", *options]


def _environment():
  environment = {
    name: value
    for name, value in os.environ.items()
    if name not in ("XLA_FLAGS", "ATLAS_ROLLOUT_TOKEN")
  }
  return {**environment, "PYTHONUNBUFFERED": "1"}


def _fails(*options):
  job = processes.Job("serve", options, environment=_environment(), split=True)
  _, stderr = job.communicate(timeout=120)
  return job.returncode, stderr


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  path = tmp_path_factory.mktemp("serve") / "model"
  tiny.write_checkpoint(path, "qwen2", vocab_size=300)
  fakes.write_tokenizer(path)
  return path


@pytest.mark.slow
def test_invalid_settings_exit_with_code_2(directory):
  with socket.socket() as taken:
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    port = taken.getsockname()[1]
    served = ("--engine=jax", "--role=policy", f"--model={directory}")
    for options, message in [
      ((*served, "--host=0.0.0.0"), "ATLAS_ROLLOUT_TOKEN"),
      ((*served, f"--port={port}"), "Set --port="),
      ((*served, "--port=0", "--tensor_parallel_size=2"), "requires --engine"),
      (("--engine=vllm", *served[1:], "--port=0"), "install_rollout.sh"),
      (served[:2], "--model"),
    ]:
      code, text = _fails(*options)
      assert code == 2, text
      assert message in text
      assert "Traceback" not in text


@pytest.mark.slow
def test_sigterm_finishes_running_requests_and_exits_with_zero(directory):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  options = ("--engine=jax", "--role=policy", f"--model={directory}")
  with subprocess.Popen(
    _command(*options, f"--port={port}"),
    cwd=_ROOT,
    env=_environment(),
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    client = httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60.0)
    try:
      _wait_until_healthy(process, client)
      prompt = {"row_id": "x", "text": "a secret question"}
      request = {
        "request_id": "r",
        "prompts": [prompt],
        "n": 2,
        "max_tokens": 8,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "seed": 0,
      }
      reply = client.post("/generate", json=request)
      assert reply.status_code == 200, reply.text
      # The open connection must not keep the server alive.
      process.send_signal(signal.SIGTERM)
      assert process.wait(60) == 0
      log = process.stderr.read()
      assert "1 prompts x 2" in log
      assert "secret" not in log
    finally:
      client.close()
      process.kill()


def _wait_until_healthy(process, client):
  deadline = time.monotonic() + 120
  while time.monotonic() < deadline and process.poll() is None:
    try:
      if client.get("/health").status_code == 200:
        return
    except httpx2.TransportError:
      time.sleep(0.2)
  pytest.fail(f"The server did not start: {process.poll()}")
