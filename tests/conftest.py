# SPDX-License-Identifier: Apache-2.0
"""Every test sees eight simulated CPU devices and no hub."""

import os

os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
  ]
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# A program that an older version compiled would hide what this one compiles.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
