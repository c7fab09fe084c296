# SPDX-License-Identifier: Apache-2.0
"""CISPO, which clips the importance weight: MiniMax, arXiv:2506.13585.

The upper bound 1 + clip_high = 5 follows Khatri et al., arXiv:2510.13786.
"""

import ml_collections

from configs.loss import grpo


def get_config() -> ml_collections.ConfigDict:
  config = grpo.get_config()
  config.loss.clipping = "weight"
  config.loss.clip_low = 1.0  # No lower bound: ratios are never below 0.
  config.loss.clip_high = 4.0
  config.loss.kl_coef = 0.0
  config.loss.aggregate = "token_mean"
  return config
