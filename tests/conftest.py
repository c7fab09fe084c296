# SPDX-License-Identifier: Apache-2.0
"""Configures all tests: eight simulated CPU devices, and no Hub access."""

import gc
import os
import shutil
import tempfile

from tests import quick_compile

os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    quick_compile.XLA_FLAGS,
  ]
)
os.environ["JAX_PLATFORMS"] = "cpu"
# XLA runs independent collectives of a program at once, and each blocks threads
# until all devices have joined. With the default, a thread per device, two that
# start together can wait for each other: after 40 s XLA aborts the process.
os.environ["PJRT_NPROC"] = "64"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Compiled programs are shared by all processes of one run, and by no other:
# workers and the programs that tests start inherit the directory.
_CACHE = "JAX_COMPILATION_CACHE_DIR"
if "PYTEST_XDIST_WORKER" not in os.environ:
  os.environ[_CACHE] = tempfile.mkdtemp(prefix="atlas_jax_programs_")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def pytest_unconfigure():
  """Deletes the compiled programs after the last test."""
  if "PYTEST_XDIST_WORKER" not in os.environ:
    shutil.rmtree(os.environ[_CACHE], ignore_errors=True)


def pytest_collection_finish():
  """Excludes modules and tests from garbage collection, which is frequent."""
  gc.collect()
  gc.freeze()


def pytest_collection_modifyitems(config, items):
  """Deselects `large` tests unless requested, and runs slow files first.

  A worker runs whole files. With the longest first, workers finish at about
  the same time.
  """
  if "large" not in config.option.markexpr:
    large = [item for item in items if item.get_closest_marker("large")]
    items[:] = [item for item in items if item not in large]
    config.hook.pytest_deselected(items=large)
  slow = {item.path for item in items if item.get_closest_marker("slow")}
  items.sort(
    key=lambda item: (
      item.path.parent.name != "end_to_end",
      item.path not in slow,
    )
  )
