# SPDX-License-Identifier: Apache-2.0
"""Loss of the ATLAS teacher: GRPO with DAPO's clip_high and filter.

Advantages are divided by a standard deviation of at least `min_std`.
"""

import ml_collections

from configs.loss import grpo


def get_config() -> ml_collections.ConfigDict:
  config = grpo.get_config()
  config.loss.clip_high = 0.28
  # Without it, teachings that all do equally well would be trained on for their
  # brevity as much as others for the answers.
  config.advantages.min_std = 0.5
  # Groups of zero advantage would take as much compute as others.
  config.groups.filter_equal = True
  return config
