# SPDX-License-Identifier: Apache-2.0
"""Section `rollout`: the sampling backend and its timeouts."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(  # rollout.sampler.Settings
      backend="jax",  # Where to sample: jax, in this process; http, on servers.
      policy_urls=(),  # Addresses of the policy's servers.
      student_urls=(),  # Addresses of the student's servers.
      weights_root="",  # Folder for pushed weights; empty: in /dev/shm.
      dtype="bfloat16",  # Precision of pushed weights: bfloat16 or float32.
      wait_s=600.0,  # Seconds to wait while no server is available.
      generate_s=1800.0,  # Time limit of a request, in seconds.
      update_s=600.0,  # Time limit of a weight push, in seconds.
    )
  )
