# SPDX-License-Identifier: Apache-2.0
"""The flags that name reward functions of the user's own."""

from absl import flags

from atlas_jax.rewards import custom

_PATHS = flags.DEFINE_multi_string(
  "reward_fn",
  [],
  "A reward function of yours, as module:function or module:function=weight, "
  "which is added to the config's reward. May be given several times.",
)
_TIMEOUT_S = flags.DEFINE_float(
  "reward_fn_timeout_s", 60.0, "What one call of it may take."
)
_MEMORY_GB = flags.DEFINE_float(
  "reward_fn_memory_gb", 0.0, "What its process may hold; 0 is no limit."
)


def parse() -> custom.Functions:
  """Reads the flags.

  Raises:
    errors.ConfigError: if one cannot be understood.
  """
  return custom.parse(
    _PATHS.value, timeout_s=_TIMEOUT_S.value, memory_gb=_MEMORY_GB.value
  )
