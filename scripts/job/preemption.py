# SPDX-License-Identifier: Apache-2.0
"""Requests to stop: by a person, a scheduler, or the platform.

SIGTERM  Kubernetes, Slurm at the end of its time, `kill`
SIGINT   a person, by control-C
SIGUSR1  Slurm ahead of that, by `--signal=USR1@300`
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

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@contextlib.contextmanager
def listen() -> Iterator[Callable[[], bool]]:
  """Listens to signals; the second SIGTERM or SIGINT ends the process at once.

  Where several processes run as one, all of them stop after the same step,
  whichever was asked: JAX's preemption service agrees on it. It also hears the
  notices of Cloud TPUs, and takes SIGTERM for itself.

  Yields:
    A function to ask after each step: whether to save, and stop.
  """
  is_shared = jax.distributed.is_initialized()
  asked: list[int] = []
  calls = itertools.count()

  def on_signal(number: int, frame: object) -> None:
    del frame
    # SIGUSR1 comes ahead of another, which may still leave time to save.
    if number != signal.SIGUSR1 and set(asked) - {signal.SIGUSR1}:
      _exit_now()
    asked.append(number)
    logging.warning(
      "Got %s; saving after this step.", signal.Signals(number).name
    )
    if is_shared:
      os.kill(os.getpid(), signal.SIGTERM)

  def should_stop() -> bool:
    if is_shared:  # Every process asks after every step, so they count alike.
      return multihost_utils.reached_preemption_sync_point(next(calls))
    return bool(asked)

  heard = [n for n in _SIGNALS if not (is_shared and n == signal.SIGTERM)]
  old = {number: signal.signal(number, on_signal) for number in heard}
  try:
    yield should_stop
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)


def _exit_now() -> NoReturn:
  """Waits for no step, save or thread; a handler may not use buffers."""
  told = errors.PreemptedError(
    "Interrupted before the step was done.",
    where="this process",
    why="It was asked to stop twice.",
    fix="Run the same command again: it goes on from the last checkpoint.",
  )
  os.write(2, f"\n{told}\n".encode())
  os._exit(told.exit_code)
