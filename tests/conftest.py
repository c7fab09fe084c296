# SPDX-License-Identifier: Apache-2.0
"""Every test sees eight simulated CPU devices and no hub."""

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
# A program that an older version compiled would hide what this one compiles.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"


def pytest_collection_modifyitems(config, items):
  """Leaves out what takes gigabytes, unless its mark is asked for.

  The files that take longest come first: no worker waits long for another.
  """
  if "large" not in config.option.markexpr:
    large = [item for item in items if item.get_closest_marker("large")]
    items[:] = [item for item in items if item not in large]
    config.hook.pytest_deselected(items=large)
  items.sort(key=lambda item: item.path.parent.name != "end_to_end")
