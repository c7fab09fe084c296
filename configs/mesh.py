# SPDX-License-Identifier: Apache-2.0
"""Section `mesh`: parameters are sharded over all devices."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(  # sharding.make_mesh
      data=1,  # Replicas; one axis may be -1, for all remaining devices.
      fsdp=-1,  # Devices that shard rows, parameters and optimizer state.
      tensor=1,  # Devices that shard heads, MLP and vocabulary.
      context=1,  # Devices that shard the tokens of a row.
      expert=1,  # Devices that shard the experts.
    )
  )
