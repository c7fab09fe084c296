# SPDX-License-Identifier: Apache-2.0
"""Prints the values of a config, with origin and meaning, and exits.

  python -m scripts.train_sft --config=configs/run/teacher_sft.py:smoke \
    --config.seed=1 --print_config

The launchers accept the flag too, and show which override set a value.
"""

from collections.abc import Mapping
import pathlib
import re

from absl import flags
from ml_collections import config_flags

from atlas_jax import types
from scripts import launch_overrides
from scripts.job import arguments, config_keys

_PRINT = flags.DEFINE_bool(
  "print_config",
  False,
  "Print each config value, its origin and meaning, and exit.",
)

_SECRET = re.compile(r"token|secret|password|api_?key", re.IGNORECASE)
_HARMLESS = re.compile(r"tokens\b|tokenizer")  # Token counts, and a file.


def print_if_requested(recipe: str) -> bool:
  """Prints the config if --print_config is set; returns whether it is.

  Raises:
    errors.ConfigError: see `arguments.parse_config`.
  """
  if _PRINT.value:
    config = arguments.parse_config(recipe)
    flag = flags.FLAGS["config"]
    given = config_flags.get_override_values(flag)
    path = config_flags.get_config_filename(flag)
    print(table(path, config, dict.fromkeys(given, "flag")))
  return _PRINT.value


def table(
  recipe: str,
  config: types.Config,
  given: Mapping[str, str],
) -> str:
  """Formats values, origins and meanings of a config, one key per line.

  The origin of a value is what set it on the command line; else its variant;
  "recipe" for the recipe's file, and "default" for the files it is built from.

  Args:
    recipe: `FILE.py[:VARIANT]`.
    config: the recipe's config with all overrides applied.
    given: the origin of each overridden value, by dotted name.
  """
  path, _, variant = recipe.partition(":")
  base = dict(config_keys.values(launch_overrides.load(path, [])))
  keys = config_keys.read(pathlib.Path(path))
  rows = []
  for name, value in config_keys.values(config):
    key = keys.get(name)
    if name in given:
      origin = given[name]
    elif variant and base.get(name) != value:
      origin = f":{variant}"
    elif key is None or key.file.resolve() == pathlib.Path(path).resolve():
      origin = "recipe"
    else:
      origin = "default"
    shown = "***" if _is_secret(name) and value else repr(value)
    rows.append((name, shown, origin, f"# {key.meaning}" if key else ""))
  widths = [min(max(len(row[i]) for row in rows), 40) for i in range(3)]
  return "\n".join(
    "  ".join(
      f"{cell:<{width}}" for cell, width in zip(row, [*widths, 0], strict=True)
    ).rstrip()
    for row in rows
  )


def _is_secret(name: str) -> bool:
  return bool(_SECRET.search(_HARMLESS.sub("", name)))
