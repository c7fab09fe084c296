# SPDX-License-Identifier: Apache-2.0
"""Handles requests to stop from a user, a scheduler or the platform.

SIGTERM  Kubernetes, Slurm at its time limit, `kill`
SIGINT   control-C
SIGHUP   a closed terminal or connection; ignored under nohup
SIGUSR1  Slurm ahead of its time limit, with `--signal=USR1@300`
"""

from collections.abc import Callable, Iterator
import contextlib
import itertools
import os
import signal
from typing import NoReturn

from absl import logging
import jax
from jax.experimental import multihost_utils

from atlas_jax import errors

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# Requests that do not count as a first or second one: an early warning, and one
# that the kernel and the shell may both send.
_GENTLE = {signal.SIGHUP, signal.SIGUSR1}


@contextlib.contextmanager
def listen() -> Iterator[Callable[[], bool]]:
  """Handles stop signals; a second SIGTERM or SIGINT exits at once.

  In a multi-process job all processes stop after the same step, whichever
  received the signal: JAX's preemption service agrees on the step. The service
  also receives Cloud TPU preemption notices, and handles SIGTERM itself.

  Yields:
    A function to call after each step; returns whether to save and stop.
  """
  is_shared = jax.distributed.is_initialized()
  received: list[int] = []
  calls = itertools.count()

  def on_signal(number: int, frame: object) -> None:
    del frame
    if number not in _GENTLE and set(received) - _GENTLE:
      _exit_now()
    received.append(number)
    logging.warning(
      "Got %s; saving after this step.", signal.Signals(number).name
    )
    if is_shared:
      os.kill(os.getpid(), signal.SIGTERM)

  def should_stop() -> bool:
    if is_shared:  # Called once per step, so the counts of processes agree.
      return multihost_utils.reached_preemption_sync_point(next(calls))
    return bool(received)

  handled = {*_SIGNALS} - {signal.SIGTERM if is_shared else None}
  if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # By nohup.
    handled.remove(signal.SIGHUP)
  old = {number: signal.signal(number, on_signal) for number in handled}
  try:
    yield should_stop
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)


def _exit_now() -> NoReturn:
  """Exits without waiting for a step, a save or a thread.

  Writes to the file descriptor: buffered I/O is not safe in a signal handler.
  """
  error = errors.PreemptedError(
    "Interrupted before the step was complete.",
    where="this process",
    why="It received a second request to stop.",
    fix="Run the same command again: it resumes from the last checkpoint.",
  )
  os.write(2, f"\n{error}\n".encode())
  os._exit(error.exit_code)
