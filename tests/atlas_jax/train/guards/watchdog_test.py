# SPDX-License-Identifier: Apache-2.0
"""A hanging process exits with its stacks; a running one is left alone."""

import subprocess
import sys
import threading
import time

import pytest

from atlas_jax.train.guards import watchdog

_HANGS = """
import ctypes, sys, threading, time
from atlas_jax.train.guards import watchdog

def stuck():
  if sys.argv[1] == "lock":
    ctypes.PyDLL(None).sleep(60)  # Holds the GIL.
  threading.Event().wait(60)

watchdog._GRACE_S = float(sys.argv[2])
with watchdog.Watchdog(0.5, lambda: [4, 6]) as dog:
  for step in range(1, 8):
    time.sleep(0.1)
    dog.beat(step)
  stuck()
"""


# If the thread can run, it exits long before the timer expires.
@pytest.mark.parametrize(("how", "grace_s"), [("wait", 300.0), ("lock", 0.5)])
def test_a_hang_exits_with_stacks_and_its_own_code(how, grace_s):
  started = time.monotonic()
  child = subprocess.run(
    [sys.executable, "-c", _HANGS, how, str(grace_s)],
    capture_output=True,
    text=True,
    timeout=50,
    check=False,
  )
  assert child.returncode == 124, child.stderr
  assert time.monotonic() - started < 40
  assert "in stuck" in child.stderr
  if how == "wait":  # Logging needs the GIL.
    assert "NO PROGRESS for 0.5 s. The last step done is 7." in child.stderr
    assert "code 124 because of --config.loop.watchdog_s" in child.stderr
    assert "Latest checkpoint: step 6." in child.stderr


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_no_thread_is_left_after_exit(seconds):
  before = set(threading.enumerate())
  with watchdog.Watchdog(seconds, lambda: []) as dog:
    dog.beat(1)
    assert (set(threading.enumerate()) != before) == bool(seconds)
  for thread in set(threading.enumerate()) - before:
    thread.join(5.0)
  assert set(threading.enumerate()) == before
