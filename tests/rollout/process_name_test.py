# SPDX-License-Identifier: Apache-2.0
"""A process counts as exited only if that is certain."""

import os
import pathlib
import subprocess
import sys

from rollout import process_name

_ROOT = pathlib.Path(__file__).parents[2]
_CODE = """
import time
from rollout import process_name
print(process_name.this_process(), flush=True)
time.sleep(60)
"""


def _start():
  child = subprocess.Popen(
    [sys.executable, "-c", _CODE], cwd=_ROOT, stdout=subprocess.PIPE
  )
  return child, child.stdout.readline().decode().strip()


def test_a_process_has_ended_only_after_it_was_killed():
  child, name = _start()
  with child:
    assert name
    assert not process_name.has_ended(name)
    child.kill()
    # Waits without reaping, which leaves a zombie.
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process_name.has_ended(name)
    child.wait(10)
    assert process_name.has_ended(name)


def test_a_reused_pid_is_another_process():
  head, _, start = process_name.this_process().rpartition("/")
  assert not process_name.has_ended(f"{head}/{start}")
  assert process_name.has_ended(f"{head}/{int(start) - 1}")


def test_processes_of_other_machines_and_users_are_unknown(monkeypatch):
  name = process_name.this_process()
  for other in ("", "x", f"elsewhere{name}", name.rpartition("/")[0] + "/x/y"):
    assert not process_name.has_ended(other)

  def forbid(*_):
    raise PermissionError

  monkeypatch.setattr(process_name.os, "kill", forbid)
  monkeypatch.setattr(process_name, "_state_and_start", lambda _: ("Z", ""))
  assert not process_name.has_ended(name)
