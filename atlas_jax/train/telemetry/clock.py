# SPDX-License-Identifier: Apache-2.0
"""Where the time of a run goes, phase by phase."""

import collections
from collections.abc import Callable, Iterator
import contextlib
import time

IDLE = "idle"


class Clock:
  """Splits the time of one thread between phases, leaving none out.

  What happens in no phase is `IDLE`, and a phase within another stops the outer
  one. So the seconds of all phases always add up to the time that has passed.
  """

  def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
    """Starts in no phase; `now` tells the time in seconds."""
    self._now, self._last = now, now()
    self._phase = IDLE
    self._seconds: dict[str, float] = collections.defaultdict(float)

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Counts the time of a `with` block as that of `name`."""
    outer = self._switch(name)
    try:
      yield
    finally:
      self._switch(outer)

  def take(self) -> dict[str, float]:
    """Gives the seconds of each phase since the last call."""
    self._switch(self._phase)
    taken, self._seconds = self._seconds, collections.defaultdict(float)
    return dict(taken)

  def move(self, seconds: float, to: str) -> None:
    """Counts seconds of the present phase, just over, as those of `to`."""
    self._seconds[self._phase] -= seconds
    self._seconds[to] += seconds

  def _switch(self, phase: str) -> str:
    now = self._now()
    self._seconds[self._phase] += now - self._last
    self._last = now
    outer, self._phase = self._phase, phase
    return outer
