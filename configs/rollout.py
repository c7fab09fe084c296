# SPDX-License-Identifier: Apache-2.0
"""The section `rollout`: who samples, and how long is waited for it."""

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
