# SPDX-License-Identifier: Apache-2.0
"""The end of a run in which nothing goes on any more.

A lost host or a dead disk lets others wait for ever, and pay for it. So a
process in which no step ends in time tells where it hangs, and exits.
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

_GRACE_S = 5.0  # Of the timer, which comes second.
_CLOCK_MONOTONIC = 1
_SIGEV_THREAD = 2


class Watchdog:
  """Exits with all stacks and `errors.Exit.HANG`, unless it hears of progress.

  A thread does so. It cannot while another one hangs with Python's lock in its
  hands; then a timer of the C library does, which needs no lock.
  """

  def __init__(
    self, seconds: float, steps: Callable[[], Sequence[int]]
  ) -> None:
    """Watches nothing yet.

    Args:
      seconds: that may pass between two calls of `beat`; 0.0 for ever.
      steps: gives those on disk.
    """
    self._seconds, self._steps = seconds, steps
    self._done = "No step is done yet"
    self._thread: threading.Timer | None = None
    self._timer = _Timer() if seconds and sys.platform == "linux" else None

  def __enter__(self) -> Self:
    self._arm()
    return self

  def __exit__(self, *error: object) -> None:
    self._disarm()

  def beat(self, step: int) -> None:
    """Hears that there is progress, and which step is the last one done."""
    self._done = f"The last step done is {step}"
    self._disarm()
    self._arm()

  def _arm(self) -> None:
    if not self._seconds:
      return
    self._thread = threading.Timer(self._seconds, self._bark)
    self._thread.daemon = True
    self._thread.start()
    if self._timer is not None:
      later = self._seconds + _GRACE_S
      faulthandler.dump_traceback_later(later, file=sys.stderr)
      self._timer.set(later + 1.0)

  def _disarm(self) -> None:
    if self._thread is not None:
      self._thread.cancel()
    if self._timer is not None:
      faulthandler.cancel_dump_traceback_later()
      self._timer.set(0.0)

  def _bark(self) -> None:
    logging.error(
      "NO PROGRESS for %g s. %s. What every thread is doing:",
      *(self._seconds, self._done),
    )
    logging.flush()
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    logging.error(
      "The newest checkpoint is that of step %s. Run the same command again to "
      "go on from there; --config.loop.watchdog_s sets how long to wait.",
      max(self._steps(), default="none"),
    )
    logging.flush()
    os._exit(errors.Exit.HANG)


class _Timer:
  """A timer of POSIX, at whose end the C library calls `_exit`.

  SIGEV_THREAD calls a function in a thread of its own: here one of the C
  library, so that no line of Python has to run.
  """

  def __init__(self) -> None:
    """Is not set yet."""
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
    """Begins to count anew; 0.0 stops it."""
    whole, rest = divmod(seconds, 1.0)
    end = _Times(0, 0, int(whole), int(rest * 1e9))
    self._check(
      self._libc.timer_settime(self._timer, 0, ctypes.byref(end), None)
    )

  def _check(self, code: int) -> None:
    if code:
      number = ctypes.get_errno()
      raise OSError(number, os.strerror(number))


class _Event(ctypes.Structure):
  """struct sigevent, of 64 bytes."""

  _fields_ = (
    ("value", ctypes.c_void_p),
    ("signal", ctypes.c_int),
    ("notify", ctypes.c_int),
    ("function", ctypes.c_void_p),
    ("rest", ctypes.c_byte * 40),
  )


class _Times(ctypes.Structure):
  """struct itimerspec: an interval and an end, in seconds and nanoseconds."""

  _fields_ = tuple(
    (name, ctypes.c_long)
    for name in ("interval_s", "interval_ns", "end_s", "end_ns")
  )
