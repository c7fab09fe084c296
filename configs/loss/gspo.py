# SPDX-License-Identifier: Apache-2.0
"""GSPO, sequence-level ratios: Zheng et al., arXiv:2507.18071, section 5.1."""

import ml_collections

from configs.loss import grpo


def get_config() -> ml_collections.ConfigDict:
  config = grpo.get_config()
  config.loss.ratio = "sequence"  # Or "sequence_token".
  config.loss.clip_low = 3e-4
  config.loss.clip_high = 4e-4
  config.loss.kl_coef = 0.0
  return config
