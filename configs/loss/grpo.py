# SPDX-License-Identifier: Apache-2.0
"""GRPO: Shao et al., arXiv:2402.03300."""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(
      loss=dict(  # losses.grpo.Objective
        ratio="token",
        clipping="objective",
        clip_low=0.2,
        clip_high=0.2,
        max_ratio=config_dict.placeholder(float),
        kl_coef=0.04,
        kl_estimator="k3",
        kl_in="loss",
        entropy_coef=0.0,
        aggregate="sequence_mean",
      ),
      # losses.advantages.group_advantages
      advantages=dict(baseline="mean", scale="group", min_std=0.0),
      # Whether to drop groups of equal rewards, how often to refill them, and
      # the largest fraction of a batch that late servers may drop.
      groups=dict(filter_equal=False, max_refills=0, max_dropped_fraction=0.25),
    )
  )
