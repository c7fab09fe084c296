# SPDX-License-Identifier: Apache-2.0
"""The flags of every program: the config and where to write."""

import os
import pathlib

from absl import flags
import jax
import ml_collections
from ml_collections import config_flags

from atlas_jax import errors, types
from scripts.job import config_checks, recipes

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  help_string="The recipe: FILE.py, or FILE.py:VARIANT such as :smoke.",
  lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "The directory to write to; the same command again resumes the run in it.",
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


def parse(recipe: str) -> tuple[types.Config, pathlib.Path]:
  """Returns the config and the workdir, and sets JAX's compilation cache.

  Args:
    recipe: the value of `config.recipe` that the program runs.

  Raises:
    errors.ConfigError: if --workdir is not set, or see `parse_config`.
    errors.CheckpointError: if the folder of a model does not exist.
  """
  config = parse_config(recipe)
  if _WORKDIR.value is None:
    raise errors.ConfigError(
      "--workdir is not set.",
      where="command line",
      why="A run writes its checkpoints, metrics and export there.",
      fix="Set --workdir=FOLDER, for example --workdir=results/run. "
      "--print_config, --show_samples and --plan work without it.",
    )
  config_checks.check_models(config)
  jax.config.update("jax_compilation_cache_dir", _COMPILE_CACHE.value or None)
  return config, pathlib.Path(_WORKDIR.value)


def workdir() -> pathlib.Path:
  """Returns the workdir, or the current directory if it is not set."""
  return pathlib.Path(_WORKDIR.value or ".")


def parse_config(recipe: str) -> types.Config:
  """Returns the config, with the full names of all precisions.

  Args:
    recipe: the value of `config.recipe` that the program runs.

  Raises:
    errors.ConfigError: if the config is for another program, or a flag sets an
      optimizer that is not used, or steps to profile where there are none, or a
      value is not in its range.
  """
  config = _CONFIG.value
  if config is None:
    raise errors.ConfigError(
      "--config is not set.",
      where="command line",
      why="It names the recipe to run.",
      fix="Set it to a file of configs/run; --help shows an example.",
    )
  if not isinstance(config, ml_collections.ConfigDict):
    raise errors.ConfigError(
      "The config file is not a recipe.",
      where="--config",
      why=f"Its get_config returns {type(config).__name__}, not a ConfigDict.",
      fix="Use a file of configs/run.",
    )
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
  config_checks.check(config)
  return config


def check_data(config: types.Config) -> None:
  """Validates that the config names a dataset.

  Raises:
    errors.ConfigError: if it does not.
  """
  if config.data.path is None:
    raise errors.ConfigError(
      "data.path is not set.",
      where="--config.data.path",
      why="This recipe has no default dataset.",
      fix="Set --config.data.path to a file, a folder or a Hub dataset.",
    )
