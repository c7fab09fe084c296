# SPDX-License-Identifier: Apache-2.0
"""GRPO: Shao et al., arXiv:2402.03300."""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(
      loss=dict(  # losses.grpo.Objective
        # Ratio to the old policy: token, sequence, sequence_token or product.
        ratio="token",
        clipping="objective",  # Clips the objective or the weight (CISPO).
        clip_low=0.2,  # Lower bound of the ratio: 1 - clip_low.
        clip_high=0.2,  # Upper bound of the ratio: 1 + clip_high.
        # Upper bound of the ratio if the advantage is negative; None: none.
        max_ratio=config_dict.placeholder(float),
        kl_coef=0.04,  # Weight of the KL divergence from the reference.
        kl_estimator="k3",  # Estimator of the KL: k1, k2 or k3.
        kl_in="loss",  # Where the KL is added: loss, weighted_loss or reward.
        entropy_coef=0.0,  # Weight of the entropy bonus.
        # Mean over tokens: sequence_mean, token_mean or constant_length.
        aggregate="sequence_mean",
      ),
      advantages=dict(  # losses.advantages.group_advantages
        baseline="mean",  # Subtracted from rewards: mean or leave_one_out.
        scale="group",  # Divides by the deviation of: group, batch or none.
        min_std=0.0,  # Least deviation to divide by, in reward units.
      ),
      groups=dict(  # train.grpo.train
        filter_equal=False,  # Whether to drop groups of equal rewards.
        max_refills=0,  # Rounds of sampling others in their place.
        # Fraction of answers that late servers may drop from a batch.
        max_dropped_fraction=0.25,
      ),
    )
  )
