# SPDX-License-Identifier: Apache-2.0
"""Functions that may raise, hang or eat memory, in processes of their own.

A worker is a fresh Python, reached by JSON lines on a socket. Whatever happens
in there costs the answer it was asked for and no other: one that does not
answer in time is killed with all its children, and started anew when it is
needed again.
"""

from collections.abc import Iterable
from concurrent import futures
import dataclasses
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import time
from typing import Any, Literal

from atlas_jax import errors

_START_S = 120.0  # Imports included.
_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Answer:
  """What a function returned, as JSON, or else why there is nothing."""

  value: Any = None  # Any: JSON.
  failure: str = ""


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one call may take; 0 bytes are no limit."""

  timeout_s: float
  max_memory_bytes: int

  def __post_init__(self) -> None:
    """Refuses a call without an end."""
    if not 0.0 < self.timeout_s < float("inf") or self.max_memory_bytes < 0:
      raise ValueError(
        "Expected a finite timeout_s > 0 and max_memory_bytes >= 0, got "
        f"{self.timeout_s} and {self.max_memory_bytes}."
      )


class Worker:
  """One process with one function; asks it one thing at a time."""

  def __init__(
    self, target: str, kind: Literal["json", "records"], limits: Limits
  ) -> None:
    """Starts nothing yet.

    Args:
      target: the function, as `module:function`.
      kind: what it takes, see `worker`.
      limits: of each call, and of the process.
    """
    self._target, self._kind, self._limits = target, kind, limits
    self._process: subprocess.Popen[bytes] | None = None
    self._channel: socket.socket | None = None

  def __enter__(self) -> "Worker":
    self._start()
    return self

  def __exit__(self, *error: object) -> None:
    self._stop()

  def ask(self, argument: Any) -> Answer:  # Any: JSON.
    """Calls the function; never raises for what it does."""
    try:
      channel = self._channel or self._start()
    except errors.ConfigError as error:
      return Answer(failure=error.why)
    line = json.dumps(argument).encode() + b"\n"
    try:
      reply = json.loads(_exchange(channel, line, self._limits.timeout_s))
    except TimeoutError:
      self._stop()
      return Answer(failure=f"it took more than {self._limits.timeout_s:g} s")
    except (OSError, ValueError):
      self._stop()
      return Answer(failure="its process ended")
    return Answer(**reply)

  def _start(self) -> socket.socket:
    """Starts the process, and waits until the function is imported."""
    ours, theirs = socket.socketpair()
    with theirs:
      self._process = subprocess.Popen(
        [
          *(sys.executable, "-m", "atlas_jax.rewards.worker"),
          *(str(theirs.fileno()), self._target, self._kind),
          str(self._limits.max_memory_bytes),
        ],
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        # Its children die with it, and Ctrl-C is for the trainer.
        start_new_session=True,
        # It finds what we find, and leaves accelerators alone.
        env={
          **os.environ,
          "PYTHONPATH": os.pathsep.join(sys.path),
          "JAX_PLATFORMS": "cpu",
        },
      )
    self._channel = ours
    try:
      _exchange(ours, b"", _START_S)
    except (OSError, ValueError) as error:
      self._stop()
      raise errors.ConfigError(
        f"The function {self._target} cannot be used.",
        where=self._target,
        why="Its process did not get ready; what it said is above.",
        fix="Check that python -c 'import MODULE' works where this command "
        "was started, and that MODULE has a function of that name.",
      ) from error
    return ours

  def _stop(self) -> None:
    """Ends the process with all that it started."""
    if self._channel is not None and self._process is not None:
      self._channel.close()
      # Not waited for yet, so the group's number cannot be another's.
      os.killpg(self._process.pid, signal.SIGKILL)
      self._process.wait()
    self._channel = self._process = None


class Pool:
  """Several workers of one function."""

  def __init__(self, target: str, limits: Limits, *, num_workers: int) -> None:
    """Starts nothing yet; see `Worker`. The function takes JSON."""
    self._workers = [Worker(target, "json", limits) for _ in range(num_workers)]
    self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    self._threads = futures.ThreadPoolExecutor(num_workers, "isolated")

  def __enter__(self) -> "Pool":
    # One at first: a function that cannot be used is told of once.
    self._workers[0].__enter__()
    for worker in self._workers:
      self._idle.put(worker)
    return self

  def __exit__(self, *error: object) -> None:
    self._threads.shutdown(cancel_futures=True)
    for worker in self._workers:
      worker.__exit__()

  def map(self, arguments: Iterable[Any]) -> list[Answer]:  # Any: JSON.
    """Calls the function with each argument, in order."""

    def ask(argument: Any) -> Answer:  # Any: JSON.
      worker = self._idle.get()
      try:
        return worker.ask(argument)
      finally:
        self._idle.put(worker)

    return list(self._threads.map(ask, arguments))


def _exchange(channel: socket.socket, line: bytes, timeout_s: float) -> bytes:
  """Sends a line and waits for one.

  Raises:
    TimeoutError: if both took longer than `timeout_s`.
    OSError: if the other end is gone.
  """
  deadline = time.monotonic() + timeout_s
  channel.settimeout(timeout_s)
  channel.sendall(line)
  reply = bytearray()
  while not reply.endswith(b"\n"):
    # Never 0, which would mean not to wait at all.
    channel.settimeout(max(deadline - time.monotonic(), 1e-3))
    chunk = channel.recv(_CHUNK)
    if not chunk:
      raise ConnectionResetError("The process ended.")
    reply += chunk
  return bytes(reply)
