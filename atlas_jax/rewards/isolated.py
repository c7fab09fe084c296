# SPDX-License-Identifier: Apache-2.0
"""Runs functions that may raise, hang or exhaust memory in separate processes.

A worker is a fresh Python process that exchanges JSON lines over a socket. A
failure affects only the current call. A worker that misses its deadline is
killed with all its children, and restarted at the next call.
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

_START_S = 120.0  # Includes imports.
_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Answer:
  """The JSON value that a function returned, or the reason of its failure."""

  value: Any = None  # Any: JSON.
  failure: str = ""


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits of one call; `max_memory_bytes` of 0 is no limit."""

  timeout_s: float
  max_memory_bytes: int

  def __post_init__(self) -> None:
    """Validates the limits; a call must have a deadline."""
    if not 0.0 < self.timeout_s < float("inf") or self.max_memory_bytes < 0:
      raise ValueError(
        "Expected a finite timeout_s > 0 and max_memory_bytes >= 0, got "
        f"{self.timeout_s} and {self.max_memory_bytes}."
      )


class Worker:
  """One process that runs one function, one call at a time."""

  def __init__(
    self, target: str, kind: Literal["json", "records"], limits: Limits
  ) -> None:
    """Stores the arguments; the process starts on enter.

    Args:
      target: the function, as `module:function` or `FILE.py:function`.
      kind: type of its argument, see `worker`.
      limits: deadline of each call, and memory limit of the process.
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
    """Calls the function; failures are returned, not raised."""
    try:
      channel = self._channel or self._start()
    except errors.ConfigError as error:
      return Answer(failure=error.why)
    line = json.dumps(argument).encode() + b"\n"
    try:
      reply = json.loads(_exchange(channel, line, self._limits.timeout_s))
    except TimeoutError:
      self._stop()
      return Answer(failure=f"took more than {self._limits.timeout_s:g} s")
    except (OSError, ValueError):
      self._stop()
      return Answer(failure="process exited")
    return Answer(**reply)

  def _start(self) -> socket.socket:
    """Starts the process and waits until it has imported the function."""
    ours, theirs = socket.socketpair()
    with theirs:
      self._process = subprocess.Popen(
        [
          sys.executable,
          "-m",
          "atlas_jax.rewards.worker",
          str(theirs.fileno()),
          self._target,
          self._kind,
          str(self._limits.max_memory_bytes),
        ],
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        # A separate process group: _stop() kills it with its children, and
        # Ctrl-C reaches only the trainer.
        start_new_session=True,
        # The worker has the same import path and must not use accelerators.
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
        f"Failed to start a worker for {self._target}.",
        where=self._target,
        why="The worker did not import the function; its output is above.",
        fix="Fix what its output reports; a module must be importable in this "
        "directory.",
      ) from error
    return ours

  def _stop(self) -> None:
    """Kills the process and its children."""
    if self._channel is not None and self._process is not None:
      self._channel.close()
      # Before wait(): until then the group id cannot be reused.
      os.killpg(self._process.pid, signal.SIGKILL)
      self._process.wait()
    self._channel = self._process = None


class Pool:
  """A pool of workers that run one function, started when they are needed."""

  def __init__(self, target: str, limits: Limits, *, num_workers: int) -> None:
    """Stores the arguments, see `Worker`. The function takes JSON."""
    self._workers = [Worker(target, "json", limits) for _ in range(num_workers)]
    self._idle: queue.LifoQueue[Worker] = queue.LifoQueue()
    self._threads = futures.ThreadPoolExecutor(num_workers, "isolated")

  def __enter__(self) -> "Pool":
    # Each worker starts at its first call.
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
  """Sends a line and returns the reply line.

  Raises:
    TimeoutError: if both together take longer than `timeout_s`.
    OSError: if the other end is closed.
  """
  deadline = time.monotonic() + timeout_s
  channel.settimeout(timeout_s)
  channel.sendall(line)
  reply = bytearray()
  while not reply.endswith(b"\n"):
    # Not 0: that would make the socket non-blocking.
    channel.settimeout(max(deadline - time.monotonic(), 1e-3))
    chunk = channel.recv(_CHUNK)
    if not chunk:
      raise ConnectionResetError("The worker process exited.")
    reply += chunk
  return bytes(reply)
