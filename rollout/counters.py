# SPDX-License-Identifier: Apache-2.0
"""Adds up what a sampler does, until the trainer asks."""

import collections
import threading


class Counters:
  """Sums by name. Several threads may use it at once."""

  def __init__(self) -> None:
    """Begins with nothing."""
    self._lock = threading.Lock()
    self._sums: dict[str, float] = collections.defaultdict(float)

  def add(self, **values: float) -> None:
    """Adds to the sum of each name."""
    with self._lock:
      for name, value in values.items():
        self._sums[name] += value

  def take(self) -> dict[str, float]:
    """Gives the sums and begins anew.

    Of `tokens` and the `sample_s` that they took it gives `tokens_per_s`.
    """
    with self._lock:
      sums, self._sums = dict(self._sums), collections.defaultdict(float)
    tokens, sample_s = sums.pop("tokens", 0.0), sums.pop("sample_s", 0.0)
    if sample_s:
      sums["tokens_per_s"] = tokens / sample_s
    return sums
