# SPDX-License-Identifier: Apache-2.0
"""Section `lora`: disabled by rank 0; `targets` are the layers to adapt."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(  # components.open_policy
      path="",
      rank=0,
      alpha=32.0,
      targets=("attention/[qkvo]", "mlp/(gate|up|down)"),
    )
  )
