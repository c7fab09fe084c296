# SPDX-License-Identifier: Apache-2.0
"""Dr. GRPO, without length or difficulty bias: arXiv:2503.20783."""

import ml_collections

from configs.loss import grpo


def get_config() -> ml_collections.ConfigDict:
  config = grpo.get_config()
  config.loss.kl_coef = 0.0
  config.loss.aggregate = "constant_length"
  config.advantages.scale = "none"
  return config
