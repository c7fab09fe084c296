# SPDX-License-Identifier: Apache-2.0
"""The two flags of every job: what it does, and where it writes."""

import pathlib
from typing import Any

from absl import flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where everything is written.", required=True
)
flags.mark_flag_as_required("config")


def arguments() -> tuple[Any, pathlib.Path]:  # Any: a ConfigDict of anything.
  """Gives the config and the workdir, once flags are parsed."""
  return _CONFIG.value, pathlib.Path(_WORKDIR.value)
