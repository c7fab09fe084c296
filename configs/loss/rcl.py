# SPDX-License-Identifier: Apache-2.0
"""Loss of the ATLAS teacher: GRPO with DAPO's clip_high and filter."""

import ml_collections

from configs.loss import grpo


def get_config() -> ml_collections.ConfigDict:
  config = grpo.get_config()
  config.loss.clip_high = 0.28
  # Groups of zero advantage would take as much compute as others.
  config.groups.filter_equal = True
  return config
