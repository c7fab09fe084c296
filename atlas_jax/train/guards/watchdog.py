# SPDX-License-Identifier: Apache-2.0
"""Exits a process in which no step finishes in time.

After a lost host or a failed disk the other processes would wait, and be paid
for, indefinitely. The watchdog prints the stacks of all threads and exits.
"""

from collections.abc import Callable, Sequence
import ctypes
import faulthandler
import os
import sys
import threading
from typing import Self

from absl import logging

from atlas_jax import errors

_GRACE_S = 5.0  # Delay of the timer after the thread.
_CLOCK_MONOTONIC = 1
_SIGEV_THREAD = 2


class Watchdog:
  """Prints all stacks and exits with `errors.Exit.HANG` without a `beat`.

  A thread does so. If another thread hangs while holding the GIL, this thread
  cannot run; then a C library timer, which needs no GIL, exits the process.
  """

  def __init__(
    self, seconds: float, saved_steps: Callable[[], Sequence[int]]
  ) -> None:
    """Creates a watchdog, which starts on entering the context.

    Args:
      seconds: maximum time between two calls of `beat`; 0.0 disables it.
      saved_steps: returns the steps of the checkpoints on disk.
    """
    self._seconds, self._saved_steps = seconds, saved_steps
    self._progress = "No step is done yet"
    self._thread: threading.Timer | None = None
    self._timer = _Timer() if seconds and sys.platform == "linux" else None

  def __enter__(self) -> Self:
    self._arm()
    return self

  def __exit__(self, *error: object) -> None:
    self._disarm()

  def beat(self, step: int) -> None:
    """Restarts the timeout; `step` is the last step done."""
    self._progress = f"The last step done is {step}"
    self._disarm()
    self._arm()

  def _arm(self) -> None:
    if not self._seconds:
      return
    self._thread = threading.Timer(self._seconds, self._exit)
    self._thread.daemon = True
    self._thread.start()
    if self._timer is not None:
      timeout = self._seconds + _GRACE_S
      faulthandler.dump_traceback_later(timeout, file=sys.stderr)
      self._timer.set(timeout + 1.0)

  def _disarm(self) -> None:
    if self._thread is not None:
      self._thread.cancel()
    if self._timer is not None:
      faulthandler.cancel_dump_traceback_later()
      self._timer.set(0.0)

  def _exit(self) -> None:
    logging.error(
      "NO PROGRESS for %g s. %s. Stacks of all threads:",
      self._seconds,
      self._progress,
    )
    logging.flush()
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    logging.error(
      "Exiting with code 124 because of --config.loop.watchdog_s. Latest "
      "checkpoint: step %s. Rerun the same command to resume from it.",
      max(self._saved_steps(), default="none"),
    )
    logging.flush()
    os._exit(errors.Exit.HANG)


class _Timer:
  """A POSIX timer that calls the C library's `_exit` when it expires.

  SIGEV_THREAD calls a function in a new thread. The function is a C function,
  so no Python code has to run.
  """

  def __init__(self) -> None:
    """Creates a stopped timer."""
    self._libc = ctypes.CDLL(None, use_errno=True)
    self._timer = ctypes.c_void_p()
    event = _Event(
      value=int(errors.Exit.HANG),
      notify=_SIGEV_THREAD,
      function=ctypes.cast(self._libc._exit, ctypes.c_void_p),
    )
    self._check(
      self._libc.timer_create(
        _CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer)
      )
    )

  def set(self, seconds: float) -> None:
    """Restarts the timer; 0.0 stops it."""
    whole, fraction = divmod(seconds, 1.0)
    end = _Times(0, 0, int(whole), int(fraction * 1e9))
    self._check(
      self._libc.timer_settime(self._timer, 0, ctypes.byref(end), None)
    )

  def _check(self, code: int) -> None:
    if code:
      number = ctypes.get_errno()
      raise OSError(number, os.strerror(number))


class _Event(ctypes.Structure):
  """C `struct sigevent`, 64 bytes."""

  _fields_ = (
    ("value", ctypes.c_void_p),
    ("signal", ctypes.c_int),
    ("notify", ctypes.c_int),
    ("function", ctypes.c_void_p),
    ("rest", ctypes.c_byte * 40),
  )


class _Times(ctypes.Structure):
  """C `struct itimerspec`: interval and expiry, in seconds and nanoseconds."""

  _fields_ = tuple(
    (name, ctypes.c_long)
    for name in ("interval_s", "interval_ns", "end_s", "end_ns")
  )
