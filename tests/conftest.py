# SPDX-License-Identifier: Apache-2.0
"""Configures all tests: eight simulated CPU devices, and no Hub access."""

import os

from tests import quick_compile

os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    quick_compile.XLA_FLAGS,
  ]
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tests must compile their programs, not load those of an older version.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"


def pytest_collection_modifyitems(config, items):
  """Deselects `large` tests unless requested, and runs slow files first.

  With the longest files first, workers finish at about the same time.
  """
  if "large" not in config.option.markexpr:
    large = [item for item in items if item.get_closest_marker("large")]
    items[:] = [item for item in items if item not in large]
    config.hook.pytest_deselected(items=large)
  items.sort(key=lambda item: item.path.parent.name != "end_to_end")
