# SPDX-License-Identifier: Apache-2.0
"""Runs a command that must not outlive the process that started it.

  python -m rollout.child_process FD GRACE_S COMMAND [ARGUMENT...]

FD is the read end of a pipe whose write end only the owners hold. When all of
them have closed it or exited, or when this process receives SIGTERM, the
command receives SIGTERM. After GRACE_S seconds the rest of its process group
receives SIGKILL. Processes are never looked up by name, so no unrelated process
can be killed.
"""

import os
import select
import signal
import subprocess
import sys
import time

_POLL_S = 0.1
# Shell convention: 128 + n is the exit code of a command killed by signal n.
SIGNALLED = 128


def run(fd: int, grace_s: float, command: list[str]) -> int:
  """Runs `command` in a new session and returns its exit code.

  Forwards SIGINT and SIGTERM. The command is killed `grace_s` after the first
  SIGTERM.
  """
  pending: list[int] = []
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda n, _: pending.append(n))
  # A hangup closes the pipe; Slurm sends SIGUSR1 to the command directly.
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
    # The child is not reaped yet, so its pid cannot have been reused.
    os.killpg(child.pid, signal.SIGKILL)
    code = child.wait()
  return code if code >= 0 else SIGNALLED - code


def _is_running(pid: int) -> bool:
  """Returns whether the child runs, without reaping it, which frees its pid."""
  flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
  return os.waitid(os.P_PID, pid, flags) is None


if __name__ == "__main__":
  sys.exit(run(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
