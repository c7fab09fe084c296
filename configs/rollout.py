# SPDX-License-Identifier: Apache-2.0
"""Section `rollout`: the sampling backend and its timeouts."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(  # rollout.sampler.Settings
      backend="jax",
      policy_urls=(),
      student_urls=(),
      weights_root="",
      dtype="bfloat16",
      wait_s=600.0,
      generate_s=1800.0,
      update_s=600.0,
    )
  )
