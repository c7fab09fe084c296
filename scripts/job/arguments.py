# SPDX-License-Identifier: Apache-2.0
"""The flags of every job: what it does, and where it writes."""

import os
import pathlib
from typing import Any

from absl import flags
import jax
from ml_collections import config_flags

from atlas_jax import errors

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where everything is written.", required=True
)
_PROFILE_STEPS = flags.DEFINE_string(
  "profile_steps",
  "",
  "Steps to trace, as 3:5; the same as --config.loop.profile_steps.",
)
# The user's own: whoever can write there can run code here.
_CACHES = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
_COMPILE_CACHE = flags.DEFINE_string(
  "compile_cache",
  os.environ.get("JAX_COMPILATION_CACHE_DIR", f"{_CACHES}/atlas_jax/programs"),
  "A folder that keeps compiled programs for the next run; empty for none.",
)
flags.mark_flag_as_required("config")


def parse() -> tuple[Any, pathlib.Path]:  # Any: a ConfigDict of anything.
  """Gives the config and the workdir, once flags are parsed.

  Tells JAX where to keep compiled programs.

  Raises:
    errors.ConfigError: if a flag is of an optimizer that is not the one in use,
      or of steps where there are none.
  """
  config = _CONFIG.value
  for path in config_flags.get_override_values(flags.FLAGS["config"]):
    match path.split("."):
      case ["optimizer", section, _] if section != config.optimizer.name:
        raise errors.ConfigError(
          "A setting is of an optimizer that is not used.",
          where=f"--config.{path}",
          why=f"--config.optimizer.name is {config.optimizer.name}.",
          fix=f"Leave it out, or set --config.optimizer.name={section}.",
        )
  if _PROFILE_STEPS.value:
    if "loop" not in config:
      raise errors.ConfigError(
        "There are no steps to profile.",
        where=f"--profile_steps={_PROFILE_STEPS.value}",
        why="This job trains nothing.",
        fix="Leave it out.",
      )
    config.loop.profile_steps = _PROFILE_STEPS.value
  jax.config.update("jax_compilation_cache_dir", _COMPILE_CACHE.value or None)
  return config, pathlib.Path(_WORKDIR.value)
