# SPDX-License-Identifier: Apache-2.0
"""Starts jobs from the command line, on one or two processes."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from safetensors import numpy as safetensors

from tests import quick_compile

ROOT = pathlib.Path(__file__).parents[1]
MAX_S = 300
# One CPU device, the default outside of the tests.
ENVIRONMENT = {**os.environ, "XLA_FLAGS": quick_compile.XLA_FLAGS}


def start(script, recipe, settings, *options, num_devices):
  """Starts a job on `num_devices` simulated devices."""
  words = [f"--config.{key}={value}" for key, value in settings.items()]
  device_count = f"--xla_force_host_platform_device_count={num_devices}"
  return subprocess.Popen(
    [
      sys.executable,
      "-m",
      f"scripts.{script}",
      f"--config={ROOT}/configs/run/{recipe}.py:smoke",
      *words,
      *options,
    ],
    cwd=ROOT,
    env={
      **os.environ,
      "XLA_FLAGS": f"{quick_compile.XLA_FLAGS} {device_count}",
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def run_code(code, *arguments):
  """Starts a Python program on one device."""
  return subprocess.Popen(
    [sys.executable, "-c", code, *arguments],
    cwd=ROOT,
    env=ENVIRONMENT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def free_port():
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


@contextlib.contextmanager
def pair(start_one, *options, of_second=()):
  """Starts two processes with two devices each; kills them on exit."""
  address = f"--coordinator_address=127.0.0.1:{free_port()}"
  common = (*options, address, "--num_processes=2")
  extra = ((), tuple(of_second))
  both = [
    start_one(*common, f"--process_id={i}", *extra[i], num_devices=2)
    for i in range(2)
  ]
  try:
    yield both
  finally:
    for process in both:
      process.kill()
      process.stdout.close()
      process.wait()


def end(process):
  """Waits for a process; returns its exit code and output."""
  text, _ = process.communicate(timeout=MAX_S)
  return process.returncode, text


def succeed(process):
  """Waits for a process, checks that it succeeded, and returns its output."""
  code, text = end(process)
  assert code == 0, text
  return text


def check_equal_metrics(workdir, expected, *names):
  """Checks that two runs logged equal metrics; returns the values."""
  values, wanted = (
    [
      row[name]
      for name in names
      for row in map(json.loads, path.read_text().splitlines())
      if name in row
    ]
    for path in (run / "metrics.jsonl" for run in (workdir, expected))
  )
  # In a surrogate loss, advantages of about 1 cancel, so `abs` applies.
  assert values == pytest.approx(wanted, rel=1e-6, abs=5e-7)
  return values


def check_equal_exports(workdir, expected):
  """Checks that two runs exported equal weights."""
  got, wanted = (
    {
      name: weights
      for file in (run / "export").glob("*.safetensors")
      for name, weights in safetensors.load_file(file).items()
    }
    for run in (workdir, expected)
  )
  assert got.keys() == wanted.keys()
  for name, weights in wanted.items():
    distance = np.linalg.norm(got[name] - weights)
    assert distance <= 1e-6 * np.linalg.norm(weights), name


class Server:
  """`scripts.serve` with the JAX engine, in a separate process."""

  def __init__(self, role, directory):
    self.port = free_port()
    self.url = f"http://127.0.0.1:{self.port}"
    self._command = [
      sys.executable,
      "-m",
      "scripts.serve",
      "--engine=jax",
      f"--role={role}",
      f"--model={directory}",
      f"--port={self.port}",
    ]
    self.start()

  def start(self):
    """Starts or restarts the server."""
    self.process = subprocess.Popen(
      self._command, cwd=ROOT, stderr=subprocess.DEVNULL
    )

  def wait(self):
    """Waits until the server is healthy."""
    deadline = time.monotonic() + MAX_S
    while time.monotonic() < deadline:
      try:
        urllib.request.urlopen(self.url + "/health", timeout=1).close()
      except (urllib.error.URLError, ConnectionError, TimeoutError):
        time.sleep(0.2)
      else:
        return
    raise TimeoutError(self.url)

  def stop(self, number=signal.SIGKILL):
    """Stops the server with a signal."""
    self.process.send_signal(number)
    self.process.wait(30)
