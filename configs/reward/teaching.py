# SPDX-License-Identifier: Apache-2.0
"""The adaptive teaching reward, preset R4: degradation gets a reward of 0.

Other rewards have a weight of 0; enable them on the command line.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(  # rewards.combine.open_reward
    dict(
      weights=dict(  # rewards.combine.Weights
        # Weight of what the teaching gains; 0.0 disables a reward.
        teaching=1.0,
        rlt=0.0,  # Weight of R0: the solution's likelihood.
        well_formed=0.0,  # Weight of a finished completion with a teaching.
        overlong=0.0,  # Weight of the penalty for long completions.
        exact=0.0,  # Weight of the fraction of correct answers.
        math_verify=0.0,  # Weight of the same, by math-verify only.
      ),
      teaching=dict(  # rewards.teaching.build
        preset="R4",  # Version of the reward: R1, R2, R3, R4 or R5.
        efficiency_weight=1.0,  # Weight of brevity of the teaching.
        # Multiplier of the penalty for harm; R1 to R3 use 2.0, R4 has none.
        degradation_penalty_multiplier=ml_collections.config_dict.placeholder(
          float
        ),
        leak_penalty=1.0,  # Penalty of a teaching that has the answer.
        no_teaching_reward=0.0,  # Reward of a completion without a teaching.
      ),
      rlt=dict(  # rewards.rlt.build
        # What the student scores, with {teaching} before {solution}.
        layout="<think>\n{teaching}\n</think>\n\n<solution>\n{solution}",
        temperature=0.7,  # Temperature of the student's log-probabilities.
        coefficients=dict(  # rewards.rlt.Coefficients
          solution_mean=1.0,  # Of the solution's mean log-probability.
          solution_min=0.01,  # Of that of its least likely token.
          kl_mean=3.0,  # Of the mean KL from teacher to student.
          kl_max=0.03,  # Of the largest KL of a token.
          unclosed_penalty=1.0,  # Penalty without a closed teaching.
        ),
      ),
      overlong=dict(  # rewards.rules.overlong
        soft_fraction=0.2,  # Share of the token limit that is penalized.
      ),
      math_verify=dict(  # rewards.grading.open_grader
        timeout_s=10.0,  # Time limit of a comparison, in seconds.
        num_workers=2,  # Processes that compare answers.
      ),
    )
  )
