# SPDX-License-Identifier: Apache-2.0
"""Measures the memory that a run uses, on its devices and on the host."""

import pathlib
import re

import jax

_STATUS = pathlib.Path("/proc/self/status")
_HOST = {"VmRSS": "memory/host_gb", "VmHWM": "memory/host_peak_gb"}
_DEVICE = {
  "bytes_in_use": "memory/device_gb",
  "peak_bytes_in_use": "memory/device_peak_gb",
}


def measure() -> dict[str, float]:
  """Returns memory in use and its peaks, in units of 1e9 bytes.

  Those of the devices are the largest among this process's; CPU devices report
  none. Those of the host are this process's resident memory, on Linux only.
  """
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  found = {
    name: max(each[key] for each in stats) / 1e9
    for key, name in _DEVICE.items()
    if all(key in each for each in stats)
  }
  text = _STATUS.read_text("utf-8") if _STATUS.exists() else ""
  for key, name in _HOST.items():
    if match := re.search(rf"(?m)^{key}:\s+(\d+) kB$", text):
      found[name] = int(match[1]) * 1024 / 1e9
  return found
