# SPDX-License-Identifier: Apache-2.0
"""A model that is not trained: bfloat16, without remat."""

import ml_collections

from configs.model import hf


def get_config(
  path: str, chat_template_kwargs: str = ""
) -> ml_collections.ConfigDict:
  config = hf.get_config(path, chat_template_kwargs)
  config.param_dtype = "bfloat16"
  config.remat = "none"
  return config
