# SPDX-License-Identifier: Apache-2.0
"""Reads the memory use of this process, for benchmarks. Linux only."""

import ctypes
import pathlib
import resource


def of_process(field: str, *, reset: bool) -> int:
  """Returns a field of `/proc/self/status` in bytes.

  Args:
    field: for example VmRSS, or VmHWM for its peak.
    reset: whether to reset the peak first.
  """
  if reset:
    # Freed memory that malloc still holds would hide later allocations.
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
  status = pathlib.Path("/proc/self/status").read_text(encoding="ascii")
  (line,) = (x for x in status.splitlines() if x.startswith(field + ":"))
  return int(line.split()[1]) * 1024


def peak_bytes() -> int:
  """Returns the peak resident memory since the process started."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
