# SPDX-License-Identifier: Apache-2.0
"""The flags of every program: the config and where to write."""

import os
import pathlib

from absl import flags
import jax
from ml_collections import config_flags

from atlas_jax import errors, types
from scripts.job import recipes

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "The directory to write to.", required=True
)
_PROFILE_STEPS = flags.DEFINE_string(
  "profile_steps",
  "",
  "Steps to trace, such as 3:5; same as --config.loop.profile_steps.",
)
# In the user's home: write access to it is permission to run code here.
_CACHES = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
_COMPILE_CACHE = flags.DEFINE_string(
  "compile_cache",
  os.environ.get("JAX_COMPILATION_CACHE_DIR", f"{_CACHES}/atlas_jax/programs"),
  "JAX's persistent compilation cache; empty to disable it.",
)
flags.mark_flag_as_required("config")


def parse(recipe: str) -> tuple[types.Config, pathlib.Path]:
  """Returns the config and the workdir, and sets JAX's compilation cache.

  Args:
    recipe: the value of `config.recipe` that the program runs.

  Raises:
    errors.ConfigError: if the config is for another program, or a flag sets an
      optimizer that is not used, or steps to profile where there are none.
  """
  config = _CONFIG.value
  found = config.get("recipe")
  if found != recipe:
    program = recipes.PROGRAMS.get(found)
    raise errors.ConfigError(
      f"config.recipe must be {recipe!r} for this program, got {found!r}.",
      where="--config",
      why=f"{recipes.PROGRAMS[recipe]} runs no other recipe.",
      fix=f"Run python -m {program} with the same flags."
      if program
      else f"Set config.recipe to one of {', '.join(recipes.PROGRAMS)}.",
    )
  for path in config_flags.get_override_values(flags.FLAGS["config"]):
    match path.split("."):
      case ["optimizer", section, _] if section != config.optimizer.name:
        raise errors.ConfigError(
          "The flag sets an optimizer that is not used.",
          where=f"--config.{path}",
          why=f"--config.optimizer.name is {config.optimizer.name}.",
          fix=f"Remove it, or set --config.optimizer.name={section}.",
        )
  if _PROFILE_STEPS.value:
    if recipe == "evaluation":
      raise errors.ConfigError(
        "--profile_steps requires a training recipe.",
        where=f"--profile_steps={_PROFILE_STEPS.value}",
        why="Evaluation has no training steps.",
        fix="Remove the flag.",
      )
    config.loop.profile_steps = _PROFILE_STEPS.value
  jax.config.update("jax_compilation_cache_dir", _COMPILE_CACHE.value or None)
  return config, pathlib.Path(_WORKDIR.value)
