# SPDX-License-Identifier: Apache-2.0
"""Section `mesh`: parameters are sharded over all devices."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(data=1, fsdp=-1, tensor=1, context=1, expert=1)  # sharding.make_mesh
  )
