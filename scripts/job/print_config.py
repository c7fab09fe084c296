# SPDX-License-Identifier: Apache-2.0
"""Prints a config with the origin of every value, instead of running it.

  python -m scripts.train_sft --config=configs/run/teacher_sft.py:smoke \
    --workdir=results/sft --config.seed=1 --print_config

The launchers accept the flag too, and show which override set a value.
"""

from collections.abc import Iterator, Mapping
import os
import re
import sys

from absl import flags
import ml_collections
from ml_collections import config_flags

from atlas_jax import types
from scripts import launch_overrides

_PRINT = flags.DEFINE_bool(
  "print_config", False, "Print each config value and its origin, and exit."
)

_SECRET = re.compile(r"token|secret|password|api_?key", re.IGNORECASE)
_HARMLESS = re.compile(r"tokens\b|tokenizer")  # Token counts, and a file.


def print_if_requested() -> bool:
  """Prints the config if --print_config is set; returns whether it is."""
  if _PRINT.value:
    flag = flags.FLAGS["config"]
    given = config_flags.get_override_values(flag)
    recipe = config_flags.get_config_filename(flag)
    show(table(recipe, flag.value, dict.fromkeys(given, "command line")))
  return _PRINT.value


def show(text: str) -> None:
  """Prints text; a reader that closes the pipe early is not an error."""
  try:
    print(text, flush=True)
  except BrokenPipeError:
    # Python flushes stdout again at exit, which would fail again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def table(
  recipe: str,
  config: types.Config,
  given: Mapping[str, str],
) -> str:
  """Formats the values of a config and their origins, one value per line.

  Args:
    recipe: `FILE.py[:VARIANT]`.
    config: the recipe's config with all overrides applied.
    given: the origin of each overridden value, by dotted name.
  """
  path, _, variant = recipe.partition(":")
  defaults = dict(_values(launch_overrides.load(path, [])))
  rows = []
  for name, value in _values(config):
    if name in given:
      origin = given[name]
    elif variant and defaults.get(name) != value:
      origin = f"{path}:{variant}"
    else:
      origin = path
    shown = "***" if _is_secret(name) and value else value
    rows.append((name, shown, origin))
  widths = [min(max(len(row[i]) for row in rows), 40) for i in (0, 1)]
  return "\n".join(
    f"{name:<{widths[0]}}  {value:<{widths[1]}}  {origin}"
    for name, value, origin in rows
  )


def _is_secret(name: str) -> bool:
  return bool(_SECRET.search(_HARMLESS.sub("", name)))


def _values(
  section: types.Config,
  prefix: str = "",
) -> Iterator[tuple[str, str]]:
  """Yields the dotted name and the `repr` of every value."""
  for key, value in section.items():
    if isinstance(value, ml_collections.ConfigDict):
      yield from _values(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", repr(value)
