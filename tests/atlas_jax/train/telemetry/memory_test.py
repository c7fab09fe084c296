# SPDX-License-Identifier: Apache-2.0
"""Memory metrics are read from the devices and the operating system."""

import resource
import sys

import jax
import pytest

from atlas_jax.train.telemetry import memory


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_host_memory_is_that_of_this_process():
  found = memory.measure()
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
  assert found["memory/host_peak_gb"] == pytest.approx(peak, rel=0.05)
  assert 0.05 < found["memory/host_gb"] <= found["memory/host_peak_gb"]


def test_device_memory_is_the_largest_of_the_devices(monkeypatch):
  class Device:
    def __init__(self, in_use, peak):
      self._stats = {"bytes_in_use": in_use, "peak_bytes_in_use": peak}

    def memory_stats(self):
      return self._stats

  devices = [Device(3e9, 4e9), Device(1e9, 9e9)]
  monkeypatch.setattr(jax, "local_devices", lambda: devices)
  found = memory.measure()
  assert found["memory/device_gb"] == 3.0
  assert found["memory/device_peak_gb"] == 9.0
  devices[1]._stats = None  # As on CPUs.
  assert "memory/device_gb" not in memory.measure()
