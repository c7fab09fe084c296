# SPDX-License-Identifier: Apache-2.0
"""The section `lora`: off, and the layers that have adapters if it is on."""

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
