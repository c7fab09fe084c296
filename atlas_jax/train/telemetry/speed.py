# SPDX-License-Identifier: Apache-2.0
"""How fast a run is, and what its time goes to."""

from collections.abc import Mapping
import threading
import time

from absl import logging
import jax

from atlas_jax.train.telemetry import clock as train_clock
from atlas_jax.train.telemetry import flops

INIT, COMPILE = "init", "compile"
# What teaches the model nothing; the rest is its goodput.
_OVERHEAD = (INIT, COMPILE, "data", "save", "eval", train_clock.IDLE)
# What the compiler takes, besides tracing; from its cache it is read instead.
_COMPILING = (
  "/jax/core/compile/jaxpr_to_mlir_module_duration",
  "/jax/core/compile/backend_compile_duration",
)
_COMPILED = _COMPILING[-1]
# Before any device is touched, or a file read.
_IMPORTED = time.monotonic()


class Speed:
  """Turns the seconds of a run's phases into speeds and shares.

  It listens to the compiler while it is open: what that takes out of a phase is
  a phase of its own.
  """

  def __init__(self, clock: train_clock.Clock) -> None:
    """Ends the initialisation, which has been since the process began."""
    clock.take()
    self._clock = clock
    self._init_s: float | None = time.monotonic() - _IMPORTED
    self._seconds = {INIT: self._init_s}
    self._num_compiles = 0
    self._thread = threading.get_ident()
    device = jax.devices()[0]
    self._peak = flops.peak(device.device_kind)
    if self._peak is None:
      logging.info("Unknown device %r: there is no mfu.", device.device_kind)

  def __enter__(self) -> "Speed":
    """Listens from now on."""
    jax.monitoring.register_event_duration_secs_listener(self._hear)
    return self

  def __exit__(self, *error: object) -> None:
    """Listens no more, and tells where the time went."""
    jax.monitoring.unregister_event_duration_listener(self._hear)
    self._add(self._clock.take())
    total = sum(self._seconds.values())
    shares = sorted(self._seconds.items(), key=lambda item: -item[1])
    logging.info(
      "%.1f s in all: %s.",
      total,
      ", ".join(f"{name} {s / total:.1%}" for name, s in shares),
    )

  def take(self, mean: Mapping[str, float], num_steps: int) -> dict[str, float]:
    """Splits the time since the last call: seconds per step, and speeds.

    Args:
      mean: metrics, averaged over the steps since then. Speeds are told of
        what is there of `num_tokens` and `num_flops`.
      num_steps: done since then.
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
    return times | self._speeds(mean, taken)

  def _speeds(
    self, mean: Mapping[str, float], taken: Mapping[str, float]
  ) -> dict[str, float]:
    """Divides by the seconds of a step that are its own."""
    num_devices = jax.device_count()
    speeds = {}
    if "num_tokens" in mean:
      once = sum(taken.get(name, 0.0) for name in ("eval", "save", COMPILE))
      per_s = mean["num_tokens"] / (sum(taken.values()) - once)
      speeds["tokens_per_s"] = per_s
      speeds["device_tokens_per_s"] = per_s / num_devices
    if "num_flops" in mean:
      # Devices compute a step while the host makes the next one's data.
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

  def _hear(self, event: str, duration_secs: float, **_: str | int) -> None:
    if event == _COMPILED:
      self._num_compiles += 1
    # Other threads have time of their own.
    if event in _COMPILING and threading.get_ident() == self._thread:
      self._clock.move(duration_secs, COMPILE)
