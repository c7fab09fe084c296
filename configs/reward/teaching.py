# SPDX-License-Identifier: Apache-2.0
"""The adaptive teaching reward, preset R4: degradation is worth nothing."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(  # rewards.teaching.build
    dict(
      preset="R4",
      efficiency_weight=1.0,
      # R4 has no such penalty; R1 to R3 take 2.0.
      degradation_penalty_multiplier=ml_collections.config_dict.placeholder(
        float
      ),
      leak_penalty=1.0,
      no_teaching_reward=0.0,
    )
  )
