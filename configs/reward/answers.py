# SPDX-License-Identifier: Apache-2.0
"""Whether the policy's own answer is right."""

import ml_collections

from configs.reward import teaching


def get_config() -> ml_collections.ConfigDict:
  config = teaching.get_config()
  config.weights.teaching = 0.0
  config.weights.exact = 1.0
  return config
