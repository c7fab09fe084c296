# SPDX-License-Identifier: Apache-2.0
"""The mesh of devices, whose parameters are split over all of them."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(data=1, fsdp=-1, tensor=1, context=1, expert=1)  # sharding.make_mesh
  )
