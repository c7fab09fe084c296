# SPDX-License-Identifier: Apache-2.0
"""The memory of this process, for benchmarks. Linux only."""

import ctypes
import pathlib


def of_process(field: str, *, reset: bool) -> int:
  """Reads a field of `/proc/self/status` in bytes.

  Args:
    field: such as VmRSS, or VmHWM for its peak.
    reset: forgets the peak first.
  """
  if reset:
    # What was freed, but not given back, would hide what is taken next.
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
  status = pathlib.Path("/proc/self/status").read_text(encoding="ascii")
  (line,) = (x for x in status.splitlines() if x.startswith(field + ":"))
  return int(line.split()[1]) * 1024
