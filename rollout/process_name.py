# SPDX-License-Identifier: Apache-2.0
"""Names a process so that its own machine can tell when it is no more.

A trainer that was killed cannot say so. A server on the same machine need not
wait for its silence: it looks. Elsewhere the name means nothing, and only
silence counts.
"""

import os
import pathlib

_PROC = pathlib.Path("/proc")


def this_process() -> str:
  """Names this process; "" where there is no /proc to look it up in."""
  pid = os.getpid()
  try:
    return f"{_machine()}/{pid}/{_state_and_start(pid)[1]}"
  except OSError:
    return ""


def has_ended(name: str) -> bool:
  """Tells whether a process is known to be gone; False if that is unknown."""
  try:
    if not name or not name.startswith(f"{_machine()}/"):
      return False
    pid, start = name.split("/")[-2:]
    os.kill(int(pid), 0)  # Does nothing but look.
    state, started = _state_and_start(int(pid))
  except PermissionError:
    return False  # Someone else's, so it is there; /proc may hide it.
  except (ProcessLookupError, FileNotFoundError):
    return True
  except (OSError, ValueError, OverflowError):
    return False
  # A zombie only waits to be counted; a number may have a new owner.
  return state == "Z" or started != start


def _machine() -> str:
  """Names this boot of this machine, and its numbering of processes."""
  boot = (_PROC / "sys/kernel/random/boot_id").read_text("ascii").strip()
  numbering = (_PROC / "self/ns/pid").readlink()
  return f"{boot}/{numbering}"


def _state_and_start(pid: int) -> tuple[str, str]:
  text = (_PROC / str(pid) / "stat").read_text("utf-8", errors="replace")
  # The name of the program, in brackets, may hold anything.
  fields = text.rpartition(")")[2].split()
  return fields[0], fields[19]
