# SPDX-License-Identifier: Apache-2.0
"""Tests that one signal stops after a step, and a second one at once."""

import os
import signal
import subprocess
import sys
import time

import pytest

from scripts.job import preemption


@pytest.mark.parametrize(
  "number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]
)
def test_a_signal_requests_a_stop_and_its_handler_is_restored(number):
  before = signal.getsignal(number)
  with preemption.listen() as should_stop:
    assert not should_stop()
    os.kill(os.getpid(), number)
    assert should_stop()
  assert signal.getsignal(number) is before


def test_a_hangup_is_ignored_under_nohup():
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with preemption.listen() as should_stop:
      os.kill(os.getpid(), signal.SIGHUP)
      assert not should_stop()
  finally:
    signal.signal(signal.SIGHUP, before)


_SIGNALLED_TWICE = """
import os, signal, sys, threading, time
from scripts.job import preemption

number = int(sys.argv[1])
with preemption.listen() as should_stop:
  for early in (signal.SIGUSR1, signal.SIGHUP, signal.SIGHUP):
    os.kill(os.getpid(), early)
  os.kill(os.getpid(), number)
  assert should_stop()
  # Keeps the process alive, as a save in progress does.
  threading.Thread(target=time.sleep, args=(60,)).start()
  print("saving", flush=True)
  os.kill(os.getpid(), number)
  time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_sigterm_or_sigint_exits_at_once(number):
  with subprocess.Popen(
    [sys.executable, "-c", _SIGNALLED_TWICE, str(int(number))],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as child:
    assert child.stdout.readline() == "saving\n"
    started = time.monotonic()
    assert child.wait(timeout=30) == 75
    assert time.monotonic() - started < 20
    assert "second request to stop" in child.stderr.read()


_SHARED = """
import os, signal, socket, time
import jax
from scripts.job import preemption

with socket.socket() as free:
  free.bind(("127.0.0.1", 0))
  port = free.getsockname()[1]
jax.distributed.initialize(f"127.0.0.1:{port}", 1, 0)
with preemption.listen() as should_stop:
  for step in range(600):
    if should_stop():
      break
    if step == 3:
      os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0.05)
  else:
    raise SystemExit("should_stop() never returned True")
assert step > 3
"""


@pytest.mark.slow
def test_processes_of_one_job_stop_after_the_same_step():
  child = subprocess.run(
    [sys.executable, "-c", _SHARED],
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert child.returncode == 0, child.stderr
