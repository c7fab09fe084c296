# SPDX-License-Identifier: Apache-2.0
"""Timers and bootstrap intervals for benchmarks."""

from collections.abc import Callable
import dataclasses
import time
from typing import Any

import numpy as np


@dataclasses.dataclass
class Times:
  """Seconds of every repeat: wall-clock, and CPU time of all threads."""

  wall: list[float] = dataclasses.field(default_factory=list)
  cpu: list[float] = dataclasses.field(default_factory=list)

  def __add__(self, other: "Times") -> "Times":
    """Returns the times of two operations done one after the other."""
    return Times(
      [sum(pair) for pair in zip(self.wall, other.wall, strict=True)],
      [sum(pair) for pair in zip(self.cpu, other.cpu, strict=True)],
    )

  def take(
    self,
    function: Callable[..., Any],  # Any: arguments and result of the caller's.
    *args: Any,
  ) -> Any:
    """Calls a function, and records how long it takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function(*args)
    self.wall.append(time.perf_counter() - wall)
    self.cpu.append(time.process_time() - cpu)
    return result


def ratio_interval(
  numerators: np.ndarray, denominators: np.ndarray
) -> tuple[float, float]:
  """Returns the 95% bootstrap interval of a ratio of medians."""
  rng = np.random.default_rng(0)

  def medians(values: np.ndarray) -> np.ndarray:
    return np.median(rng.choice(values, (1000, len(values))), axis=1)

  ratios = medians(numerators) / medians(denominators)
  low, high = np.percentile(ratios, [2.5, 97.5])
  return float(low), float(high)
