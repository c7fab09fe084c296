# SPDX-License-Identifier: Apache-2.0
"""Runs a command which must not outlive the process that started it.

  python -m rollout.child_process FD GRACE_S COMMAND [ARGUMENT...]

FD is the reading end of a pipe whose writing end only the owners hold. When all
of them closed it, or died in whatever way, or when this process gets SIGTERM,
the command gets SIGTERM, and what is left of its process group after GRACE_S
seconds gets SIGKILL. Nothing is polled from afar and no process is looked up by
name, so no other one can be hit.
"""

import os
import select
import signal
import subprocess
import sys
import time

_POLL_S = 0.1
# A shell's convention: 128 + n tells of a command that signal n killed.
SIGNALLED = 128


def run(fd: int, grace_s: float, command: list[str]) -> int:
  """Runs `command` in a session of its own; returns its exit code.

  SIGINT and every SIGTERM are passed on to it; from the first SIGTERM on it has
  `grace_s`.
  """
  pending: list[int] = []
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda n, _: pending.append(n))
  # The pipe tells all there is. Slurm sends SIGUSR1 to the command as well.
  for number in (signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, signal.SIG_IGN)
  child = subprocess.Popen(command, start_new_session=True)
  kill_at = None
  try:
    while _is_running(child.pid):
      watched = [fd] if kill_at is None else []
      if select.select(watched, [], [], _POLL_S)[0] and not os.read(fd, 1):
        pending.append(signal.SIGTERM)
      if kill_at is None and signal.SIGTERM in pending:
        kill_at = time.monotonic() + grace_s
      while pending:
        os.kill(child.pid, pending.pop(0))
      if kill_at is not None and time.monotonic() > kill_at:
        break
  finally:
    # Not reaped yet, so no other process can have got its number.
    os.killpg(child.pid, signal.SIGKILL)
    code = child.wait()
  return code if code >= 0 else SIGNALLED - code


def _is_running(pid: int) -> bool:
  """Tells without reaping, which would free the number."""
  flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
  return os.waitid(os.P_PID, pid, flags) is None


if __name__ == "__main__":
  sys.exit(run(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
