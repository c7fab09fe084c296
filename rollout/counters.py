# SPDX-License-Identifier: Apache-2.0
"""Accumulates a sampler's metrics between two reads by the trainer."""

import collections
import threading


class Counters:
  """Sums by name. Thread-safe."""

  def __init__(self) -> None:
    """Creates empty sums."""
    self._lock = threading.Lock()
    self._sums: dict[str, float] = collections.defaultdict(float)

  def add(self, **values: float) -> None:
    """Adds each value to the sum of its name."""
    with self._lock:
      for name, value in values.items():
        self._sums[name] += value

  def take(self) -> dict[str, float]:
    """Returns the sums and resets them.

    Replaces `tokens` and `sample_s` by their ratio `tokens_per_s`.
    """
    with self._lock:
      sums, self._sums = dict(self._sums), collections.defaultdict(float)
    tokens, sample_s = sums.pop("tokens", 0.0), sums.pop("sample_s", 0.0)
    if sample_s:
      sums["tokens_per_s"] = tokens / sample_s
    return sums
