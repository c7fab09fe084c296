# SPDX-License-Identifier: Apache-2.0
"""A model of the small world, on a CPU: float32; `dots` is fastest there."""

import ml_collections

from configs.model import hf


def get_config(path: str) -> ml_collections.ConfigDict:
  config = hf.get_config(path)
  config.dtype = "float32"
  config.remat = "dots"
  return config
