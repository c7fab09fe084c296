# SPDX-License-Identifier: Apache-2.0
"""One signal asks to stop, a second one does not wait."""

import os
import signal
import subprocess
import sys
import time

import pytest

from scripts.job import preemption


@pytest.mark.parametrize(
  "number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
)
def test_a_signal_asks_to_stop_and_is_then_as_it_was(number):
  before = signal.getsignal(number)
  with preemption.listen() as should_stop:
    assert not should_stop()
    os.kill(os.getpid(), number)
    assert should_stop()
  assert signal.getsignal(number) is before


_ASKED_TWICE = """
import os, signal, sys, threading, time
from scripts.job import preemption

number = int(sys.argv[1])
with preemption.listen() as should_stop:
  os.kill(os.getpid(), signal.SIGUSR1)
  os.kill(os.getpid(), number)
  assert should_stop()
  # As a save does that is under way.
  threading.Thread(target=time.sleep, args=(60,)).start()
  print("saving", flush=True)
  os.kill(os.getpid(), number)
  time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_of_a_person_or_scheduler_waits_for_nothing(number):
  with subprocess.Popen(
    [sys.executable, "-c", _ASKED_TWICE, str(int(number))],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as child:
    assert child.stdout.readline() == "saving\n"
    started = time.monotonic()
    assert child.wait(timeout=30) == 75
    assert time.monotonic() - started < 20
    assert "asked to stop twice" in child.stderr.read()


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
    raise SystemExit("was never told")
assert step > 3
"""


@pytest.mark.slow
def test_where_several_processes_are_one_jax_agrees_on_the_step():
  child = subprocess.run(
    [sys.executable, "-c", _SHARED],
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert child.returncode == 0, child.stderr
