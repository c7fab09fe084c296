# SPDX-License-Identifier: Apache-2.0
"""A model that only samples: everything in bfloat16."""

import ml_collections

from configs.model import hf


def get_config(path: str) -> ml_collections.ConfigDict:
  config = hf.get_config(path)
  config.param_dtype = "bfloat16"
  config.remat = "none"
  return config
