# SPDX-License-Identifier: Apache-2.0
"""DAPO: Yu et al., arXiv:2503.14476.

Its penalty for long completions is a part of the reward.
"""

import ml_collections

from configs.loss import grpo


def get_config() -> ml_collections.ConfigDict:
  config = grpo.get_config()
  config.loss.clip_high = 0.28
  config.loss.kl_coef = 0.0
  config.loss.aggregate = "token_mean"
  config.groups.filter_equal = True
  config.groups.max_refills = 3
  return config
