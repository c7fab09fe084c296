# SPDX-License-Identifier: Apache-2.0
"""Measures throughput, utilization and goodput of a run."""

from collections.abc import Mapping
import threading
import time

from absl import logging
import jax

from atlas_jax.train.telemetry import clock as train_clock
from atlas_jax.train.telemetry import flops

INIT, COMPILE, DRY_PASS = "init", "compile", "dry_pass"
# Phases that later steps hardly spend time on.
_ONCE = (COMPILE, DRY_PASS)
# Phases without training progress; goodput is the fraction of all others.
_OVERHEAD = (INIT, *_ONCE, "data", "save", "eval", train_clock.IDLE)
# Events of compilation after tracing. With a cache hit, the second one is the
# time to read the cache.
_COMPILING = (
  "/jax/core/compile/jaxpr_to_mlir_module_duration",
  "/jax/core/compile/backend_compile_duration",
)
_COMPILED = _COMPILING[-1]
# Start of the process, approximately: before devices or files are accessed.
_IMPORTED = time.monotonic()


class Speed:
  """Computes throughput and time shares from the phases of a clock.

  While it is open it listens to JAX's compilation events, and moves compilation
  time from the current phase to the phase `COMPILE`.
  """

  def __init__(self, clock: train_clock.Clock) -> None:
    """Records startup time since process start."""
    clock.take()
    self._clock = clock
    self._init_s: float | None = time.monotonic() - _IMPORTED
    self._seconds = {INIT: self._init_s}
    self._num_compiles = 0
    self._thread = threading.get_ident()
    device = jax.devices()[0]
    self._peak = flops.peak(device.device_kind)
    if self._peak is None and device.platform != "cpu":
      logging.info("No mfu: unknown device kind %r.", device.device_kind)

  def __enter__(self) -> "Speed":
    """Starts listening to compilation events."""
    jax.monitoring.register_event_duration_secs_listener(self._on_event)
    return self

  def __exit__(self, *error: object) -> None:
    """Stops listening, and logs the time share of each phase."""
    jax.monitoring.unregister_event_duration_listener(self._on_event)
    self._add(self._clock.take())
    total = sum(self._seconds.values())
    shares = sorted(self._seconds.items(), key=lambda item: -item[1])
    logging.info(
      "Run took %.1f s: %s.",
      total,
      ", ".join(f"{name} {s / total:.1%}" for name, s in shares),
    )

  @property
  def once_s(self) -> float:
    """Seconds so far that later steps hardly spend again: compilation."""
    return sum(
      self._seconds.get(name, 0.0) + self._clock.peek(name) for name in _ONCE
    )

  def take(self, mean: Mapping[str, float], num_steps: int) -> dict[str, float]:
    """Returns timing metrics since the last call.

    Args:
      mean: metrics averaged over the steps since then. `num_tokens` and
        `num_flops` yield throughput if they are present and not 0.
      num_steps: steps done since then.
    """
    taken = self._clock.take()
    self._add(taken)
    taken = {phase: s / num_steps for phase, s in taken.items()}
    times = {f"seconds/{phase}": s for phase, s in taken.items()}
    times["step_s"] = sum(taken.values())
    times["num_compiles"] = self._num_compiles
    times["goodput"] = self._goodput()
    if self._init_s is not None:
      times["init_s"], self._init_s = self._init_s, None
    self._num_compiles = 0
    return times | self._throughput(mean, taken)

  def _throughput(
    self, mean: Mapping[str, float], taken: Mapping[str, float]
  ) -> dict[str, float]:
    """Divides per-step counts by the step's time without eval and saves."""
    num_devices = jax.device_count()
    speeds = {}
    if mean.get("num_tokens"):
      once = sum(taken.get(name, 0.0) for name in ("eval", "save", *_ONCE))
      per_s = mean["num_tokens"] / (sum(taken.values()) - once)
      speeds["tokens_per_s"] = per_s
      speeds["device_tokens_per_s"] = per_s / num_devices
    if mean.get("num_flops"):
      # Devices compute a step while the host loads the next one's data.
      updating = taken.get("train", 0.0) + taken.get("data", 0.0)
      per_s = mean["num_flops"] / updating / num_devices
      speeds["device_tflops"] = per_s / 1e12
      if self._peak is not None:
        speeds["mfu"] = per_s / self._peak
    return speeds

  def _goodput(self) -> float:
    total = sum(self._seconds.values())
    overhead = sum(self._seconds.get(name, 0.0) for name in _OVERHEAD)
    return 1.0 - overhead / total

  def _add(self, taken: Mapping[str, float]) -> None:
    for phase, seconds in taken.items():
      self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

  def _on_event(self, event: str, duration_secs: float, **_: str | int) -> None:
    if event == _COMPILED:
      self._num_compiles += 1
    # The clock measures this thread only.
    if event in _COMPILING and threading.get_ident() == self._thread:
      self._clock.move(duration_secs, COMPILE)
