# SPDX-License-Identifier: Apache-2.0
"""Measures how much time a run spends in each phase."""

import collections
from collections.abc import Callable, Iterator
import contextlib
import time

IDLE = "idle"


class Clock:
  """Attributes all time of one thread to phases.

  Time outside any phase counts as `IDLE`, and a nested phase pauses the outer
  one, so the seconds of all phases add up to the elapsed time.
  """

  def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
    """Starts in `IDLE`; `now` returns the time in seconds."""
    self._now, self._last = now, now()
    self._phase = IDLE
    self.on_phase: Callable[[str], None] = lambda _: None
    self._seconds: dict[str, float] = collections.defaultdict(float)

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Attributes the time of a `with` block to phase `name`.

    Calls `on_phase` first, with the name.
    """
    self.on_phase(name)
    outer = self._switch(name)
    try:
      yield
    finally:
      self._switch(outer)

  def take(self) -> dict[str, float]:
    """Returns the seconds of each phase since the last call."""
    self._switch(self._phase)
    taken, self._seconds = self._seconds, collections.defaultdict(float)
    return dict(taken)

  def peek(self, name: str) -> float:
    """Returns the seconds of one phase since the last `take`."""
    self._switch(self._phase)
    return self._seconds.get(name, 0.0)

  def move(self, seconds: float, to: str) -> None:
    """Moves seconds that have just elapsed from the current phase to `to`."""
    self._seconds[self._phase] -= seconds
    self._seconds[to] += seconds

  def _switch(self, phase: str) -> str:
    now = self._now()
    self._seconds[self._phase] += now - self._last
    self._last = now
    outer, self._phase = self._phase, phase
    return outer
