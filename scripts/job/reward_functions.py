# SPDX-License-Identifier: Apache-2.0
"""Flags for user-defined reward functions."""

from absl import flags

from atlas_jax.rewards import custom

_PATHS = flags.DEFINE_multi_string(
  "reward_fn",
  [],
  "A user-defined reward function, module:function or module:function=weight, "
  "that is added to the config's reward. May be repeated.",
)
_TIMEOUT_S = flags.DEFINE_float(
  "reward_fn_timeout_s", 60.0, "Limit on the seconds of one call."
)
_MEMORY_GB = flags.DEFINE_float(
  "reward_fn_memory_gb", 0.0, "Memory limit of its process in GB; 0 is none."
)


def parse() -> custom.Functions:
  """Parses the reward function flags.

  Raises:
    errors.ConfigError: if a flag is malformed.
  """
  return custom.parse(
    _PATHS.value, timeout_s=_TIMEOUT_S.value, memory_gb=_MEMORY_GB.value
  )
