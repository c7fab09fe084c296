# SPDX-License-Identifier: Apache-2.0
"""Starts jobs from the command line, on one or two processes."""

import atexit
import contextlib
import json
import multiprocessing
import os
import pathlib
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import weakref

import numpy as np
import pytest

from conversion import weights
from tests import quick_compile

ROOT = pathlib.Path(__file__).parents[1]
MAX_S = 300
# One CPU device, the default outside of the tests.
ENVIRONMENT = {**os.environ, "XLA_FLAGS": quick_compile.XLA_FLAGS}


_FORKS = multiprocessing.get_context("forkserver")
# What the scripts import. They themselves are imported in the fork: each must
# find only its own flags.
_FORKS.set_forkserver_preload(
  [
    "tests.processes",
    "atlas_jax.evaluation.evaluate",
    *(f"atlas_jax.train.{name}" for name in ("sft", "grpo", "gkd")),
    "rollout.server.app",
    "rollout.server.engine_jax",
    "scripts.job.exports",
  ]
)


class Job:
  """`python -m scripts.NAME`, forked from a process that has imported it.

  Imports take longer than most jobs of the tests; those of smoke_test.py,
  serve_test.py and launch_test.py start as commands. Methods are those of
  `subprocess.Popen`.
  """

  def __init__(
    self, script, words, *, environment=None, split=False, prepare=None
  ):
    """Starts the job.

    `split` separates stderr from stdout, `prepare` runs first in the job.
    """
    directory = pathlib.Path(tempfile.mkdtemp())
    weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)
    self._logs = [directory / f"{number}" for number in range(1 + split)]
    words = (script, *map(str, words))
    environment = environment or {**os.environ, **ENVIRONMENT}
    self._process = _FORKS.Process(
      target=_run_main,
      args=(words, environment, prepare, self._logs[0], self._logs[-1]),
    )
    self._process.start()
    self.pid = self._process.pid

  @property
  def returncode(self):
    """Returns the exit code, negative for a signal; None while it runs."""
    return self._process.exitcode

  def poll(self):
    """Returns the exit code, or None while it runs."""
    return self.returncode

  def wait(self, timeout=None):
    """Waits until it exits."""
    self._process.join(timeout)
    if self.returncode is None:
      raise TimeoutError(f"{self.pid} runs after {timeout} seconds.")
    return self.returncode

  def read(self):
    """Returns stdout and stderr up to now; stderr is None unless split."""
    texts = [log.read_text() if log.exists() else "" for log in self._logs]
    return (*texts, None)[:2]

  def communicate(self, timeout=None):
    """Waits until it exits; returns stdout and stderr."""
    self.wait(timeout)
    return self.read()

  def send_signal(self, number):
    """Sends a signal unless it has exited."""
    if self.returncode is None:
      os.kill(self.pid, number)

  def terminate(self):
    """Sends SIGTERM."""
    self.send_signal(signal.SIGTERM)

  def kill(self):
    """Sends SIGKILL."""
    self.send_signal(signal.SIGKILL)


def _run_main(words, environment, prepare, *logs):
  """Runs a script in the forked process, which exits with its code."""
  for number, path in enumerate(logs, start=1):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
  os.chdir(ROOT)
  os.environ.clear()
  os.environ.update(environment)
  sys.argv[:] = words
  if prepare:
    prepare()
  module = f"scripts.{words[0]}"
  sys.modules.pop(module, None)
  try:
    runpy.run_module(module, run_name="__main__")
  finally:
    atexit._run_exitfuncs()  # multiprocessing skips them.


def start(script, recipe, settings, *options, num_devices, guarded=True):
  """Starts a job on `num_devices` simulated devices.

  Unless `guarded`, one of several processes runs in the job itself, not in a
  child that would import everything again.
  """
  words = [f"--config.{key}={value}" for key, value in settings.items()]
  device_count = f"--xla_force_host_platform_device_count={num_devices}"
  flags = f"{quick_compile.XLA_FLAGS} {device_count}"
  config = f"--config={ROOT}/configs/run/{recipe}.py:smoke"
  environment = {**os.environ, "XLA_FLAGS": flags}
  if not guarded:
    environment["ATLAS_GUARDED"] = "1"  # supervisor.is_guarded
  return Job(script, [config, *words, *options], environment=environment)


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
  check_equal_weights(
    *(weights.of_directory(run / "export") for run in (workdir, expected))
  )


def check_equal_weights(got, wanted):
  """Checks that two `weights.Weights` are equal up to rounding."""
  assert got.keys() == wanted.keys()
  for name, weight in wanted.items():
    value = weight.read()
    distance = np.linalg.norm(got[name].read() - value)
    assert distance <= 1e-6 * np.linalg.norm(value), name


class Server:
  """`scripts.serve` with the JAX engine, in a separate process."""

  def __init__(self, role, directory):
    self.port = free_port()
    self.url = f"http://127.0.0.1:{self.port}"
    self._flags = [
      "--engine=jax",
      f"--role={role}",
      f"--model={directory}",
      f"--port={self.port}",
    ]
    self.start()

  def start(self):
    """Starts or restarts the server."""
    # On the devices of the tests.
    self.process = Job("serve", self._flags, environment=dict(os.environ))

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
