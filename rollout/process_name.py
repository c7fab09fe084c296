# SPDX-License-Identifier: Apache-2.0
"""Process names that let the same machine detect when a process has exited.

A killed trainer cannot close its weight channel. A server on the same machine
looks its process up in /proc; on other machines only the heartbeat timeout
applies.
"""

import os
import pathlib

_PROC = pathlib.Path("/proc")


def this_process() -> str:
  """Returns the name of this process, or "" without /proc."""
  pid = os.getpid()
  try:
    return f"{_machine()}/{pid}/{_state_and_start(pid)[1]}"
  except OSError:
    return ""


def has_ended(name: str) -> bool:
  """Returns whether a process is known to have exited; False if unknown."""
  try:
    if not name or not name.startswith(f"{_machine()}/"):
      return False
    pid, start = name.split("/")[-2:]
    os.kill(int(pid), 0)  # Signal 0 only checks that the process exists.
    state, started = _state_and_start(int(pid))
  except PermissionError:
    return False  # Another user's process: it exists; /proc may hide it.
  except (ProcessLookupError, FileNotFoundError):
    return True
  except (OSError, ValueError, OverflowError):
    return False
  # A zombie has exited; with another start time the pid was reused.
  return state == "Z" or started != start


def _machine() -> str:
  """Returns the machine's boot id and the PID namespace."""
  boot = (_PROC / "sys/kernel/random/boot_id").read_text("ascii").strip()
  namespace = (_PROC / "self/ns/pid").readlink()
  return f"{boot}/{namespace}"


def _state_and_start(pid: int) -> tuple[str, str]:
  text = (_PROC / str(pid) / "stat").read_text("utf-8", errors="replace")
  # Skips the program name in parentheses, which may contain spaces.
  fields = text.rpartition(")")[2].split()
  return fields[0], fields[19]
