# SPDX-License-Identifier: Apache-2.0
"""The two flags of every job: what it does, and where it writes."""

import pathlib
from typing import Any

from absl import flags
from ml_collections import config_flags

from atlas_jax import errors

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where everything is written.", required=True
)
flags.mark_flag_as_required("config")


def arguments() -> tuple[Any, pathlib.Path]:  # Any: a ConfigDict of anything.
  """Gives the config and the workdir, once flags are parsed.

  Raises:
    errors.ConfigError: if a flag is of an optimizer that is not the one in use.
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
  return config, pathlib.Path(_WORKDIR.value)
