# SPDX-License-Identifier: Apache-2.0
"""DAPO: Yu et al., arXiv:2503.14476.

Long completions are penalized in the reward (section 3.4) instead of masked.
The penalty grows over the last fifth of the token limit, as over 4096 of 20480
tokens in the paper.
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
  config.reward = dict(
    weights=dict(overlong=1.0), overlong=dict(soft_fraction=0.2)
  )
  config.batch = dict(mask_truncated=False)
  return config
