# SPDX-License-Identifier: Apache-2.0
"""Throughput excludes evaluation, saving and compilation."""

import threading

import jax
import jax.numpy as jnp
import pytest

from atlas_jax.train.telemetry import clock, flops, speed


class _Now:
  """A clock that tests advance."""

  def __init__(self):
    self.seconds = 0.0

  def __call__(self):
    """Returns the time."""
    return self.seconds


def _spend(watch, now, **phases):
  for name, seconds in phases.items():
    with watch.phase(name):
      now.seconds += seconds


def test_throughput_excludes_eval_and_save(monkeypatch):
  monkeypatch.setattr(flops, "_PEAKS", (("cpu", 2e12),))
  now = _Now()
  watch = clock.Clock(now)
  with speed.Speed(watch) as gauge:
    _spend(watch, now, data=1.0, train=3.0, teach=4.0, eval=16.0, save=32.0)
    _spend(watch, now, dry_pass=64.0)
    assert gauge.once_s == 64.0
    times = gauge.take({"num_tokens": 24.0, "num_flops": 16e12}, num_steps=2)
    _spend(watch, now, train=2.0, dry_pass=1.0)
    assert gauge.once_s == 65.0
    without = gauge.take({"num_tokens": 0.0, "num_flops": 0.0}, num_steps=1)
  assert times["step_s"] == (1 + 3 + 4 + 16 + 32 + 64) / 2
  assert not without.keys() & {"tokens_per_s", "device_tflops", "mfu"}
  assert times["seconds/train"] == 1.5
  assert times["tokens_per_s"] == 24.0 / ((1 + 3 + 4) / 2)
  num_devices = jax.device_count()
  assert times["device_tokens_per_s"] == times["tokens_per_s"] / num_devices
  assert times["device_tflops"] == pytest.approx(16 / 2.0 / num_devices)
  assert times["mfu"] == pytest.approx(times["device_tflops"] / 2)


def test_an_unknown_device_has_no_mfu_and_a_cpu_needs_no_note(caplog):
  caplog.set_level("INFO")
  now = _Now()
  watch = clock.Clock(now)
  with speed.Speed(watch) as gauge:
    _spend(watch, now, train=1.0)
    times = gauge.take({"num_flops": 1e12}, num_steps=1)
  assert "device_tflops" in times
  assert "mfu" not in times
  assert not [r for r in caplog.records if "mfu" in r.getMessage()]


def test_goodput_includes_startup_time(monkeypatch):
  monkeypatch.setattr(speed.time, "monotonic", lambda: speed._IMPORTED + 5.0)
  now = _Now()
  watch = clock.Clock(now)
  with speed.Speed(watch) as gauge:
    _spend(watch, now, train=5.0)
    first = gauge.take({}, num_steps=1)
    _spend(watch, now, save=4.0, solve=6.0)
    second = gauge.take({}, num_steps=1)
  assert first["init_s"] == pytest.approx(5.0)
  assert "init_s" not in second
  assert first["goodput"] == pytest.approx(5 / 10)
  assert second["goodput"] == pytest.approx(11 / 20)


def test_compilation_is_a_separate_phase():
  watch = clock.Clock()
  with speed.Speed(watch) as gauge:
    with watch.phase("train"):
      jax.jit(lambda x: jnp.sin(x) * 3.0)(jnp.ones(7)).block_until_ready()
    compiled = gauge.take({}, num_steps=1)
    with watch.phase("train"):
      pass
    again = gauge.take({}, num_steps=1)
  assert compiled["num_compiles"] >= 1
  assert compiled["seconds/compile"] > 0.0
  assert compiled["seconds/train"] > 0.0
  assert again["num_compiles"] == 0
  assert "seconds/compile" not in again


def test_compilations_of_other_threads_are_counted_but_not_timed():
  watch = clock.Clock()
  with speed.Speed(watch) as gauge:
    thread = threading.Thread(
      target=lambda: jax.jit(lambda x: jnp.cos(x) * 5.0)(jnp.ones(9))
    )
    thread.start()
    thread.join()
    times = gauge.take({}, num_steps=1)
  assert times["num_compiles"] >= 1
  assert "seconds/compile" not in times


def test_compilations_after_exit_are_not_counted():
  watch = clock.Clock()
  with speed.Speed(watch) as gauge:
    pass
  jax.jit(lambda x: jnp.tan(x) * 7.0)(jnp.ones(5))
  assert gauge.take({}, num_steps=1)["num_compiles"] == 0
