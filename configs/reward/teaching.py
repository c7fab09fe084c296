# SPDX-License-Identifier: Apache-2.0
"""The adaptive teaching reward, preset R4: degradation gets a reward of 0.

Other rewards have a weight of 0; enable them on the command line.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(  # rewards.combine.open_reward
    dict(
      weights=dict(  # 0 disables a reward.
        teaching=1.0,
        rlt=0.0,
        well_formed=0.0,
        overlong=0.0,
        exact=0.0,
        math_verify=0.0,
      ),
      teaching=dict(  # rewards.teaching.build
        preset="R4",
        efficiency_weight=1.0,
        # R4 has no such penalty; R1 to R3 use 2.0.
        degradation_penalty_multiplier=ml_collections.config_dict.placeholder(
          float
        ),
        leak_penalty=1.0,
        no_teaching_reward=0.0,
      ),
      rlt=dict(  # rewards.rlt.build
        layout="<think>\n{teaching}\n</think>\n\n<solution>\n{solution}",
        temperature=0.7,
        coefficients=dict(  # rewards.rlt.Coefficients
          solution_mean=1.0,
          solution_min=0.01,
          kl_mean=3.0,
          kl_max=0.03,
          unclosed_penalty=1.0,
        ),
      ),
      overlong=dict(soft_fraction=0.2),  # rewards.rules.overlong
      # rewards.grading.open_grader
      math_verify=dict(timeout_s=10.0, num_workers=2),
    )
  )
