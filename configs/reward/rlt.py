# SPDX-License-Identifier: Apache-2.0
"""R0: the student's log-probability of the solution, less a divergence."""

import ml_collections

from configs.reward import teaching


def get_config() -> ml_collections.ConfigDict:
  config = teaching.get_config()
  config.weights.teaching = 0.0
  config.weights.rlt = 1.0
  return config
