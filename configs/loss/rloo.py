# SPDX-License-Identifier: Apache-2.0
"""RLOO, a sequence as one action: Ahmadian et al., arXiv:2402.14740.

Clipping and coefficients follow TRL.
"""

import ml_collections

from configs.loss import grpo


def get_config() -> ml_collections.ConfigDict:
  config = grpo.get_config()
  config.loss.ratio = "product"
  config.loss.kl_coef = 0.05
  config.loss.kl_estimator = "k1"
  config.loss.kl_in = "reward"
  config.advantages.baseline = "leave_one_out"
  config.advantages.scale = "none"
  return config
