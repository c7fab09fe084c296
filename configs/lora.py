# SPDX-License-Identifier: Apache-2.0
"""Section `lora`: disabled by rank 0; `targets` are the layers to adapt."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(  # scripts.job.components.open_policy
      path="",  # PEFT folder to start from; empty: new adapters.
      rank=0,  # Rank of each adapter; 0: train all parameters.
      alpha=32.0,  # Adapters are scaled by alpha / rank.
      # Layers with an adapter, as regexes.
      targets=("attention/[qkvo]", "mlp/(gate|up|down)"),
    )
  )
