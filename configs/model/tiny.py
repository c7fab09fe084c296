# SPDX-License-Identifier: Apache-2.0
"""A model of the small world: float32, and the remat fastest on a CPU."""

import ml_collections

from configs.model import hf


def get_config(path: str) -> ml_collections.ConfigDict:
  config = hf.get_config(path)
  config.dtype = "float32"
  config.remat = "dots"
  return config
