# SPDX-License-Identifier: Apache-2.0
"""Describes the config of a script for `--help`, and suggests known names."""

from collections.abc import Sequence
import dataclasses
import pathlib
import textwrap

from absl import flags

from atlas_jax import errors
from scripts import launch_overrides, override_names
from scripts.job import config_keys

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_FLAG = ("--config", "-config")


@dataclasses.dataclass(frozen=True)
class ConfigHelp:
  """The recipe that a script is mostly used with, and its most used keys."""

  recipe: str
  keys: tuple[str, ...]

  def describe(self) -> str:
    """Returns the keys with their defaults and meaning."""
    path = _ROOT / "configs/run" / self.recipe
    values = dict(config_keys.values(launch_overrides.load(str(path), [])))
    meanings = config_keys.read(path)
    lines = [
      f"Settings that are often changed, and their values in {self.recipe}:"
    ]
    for key in self.keys:
      value = "" if values[key] is None else values[key]
      lines.append(f"  --config.{key}={value}")
      lines += textwrap.wrap(
        meanings[key].meaning,
        74,
        initial_indent=" " * 6,
        subsequent_indent=" " * 6,
      )
    lines.append(
      "--print_config lists every setting of a recipe; see docs/config.md."
    )
    return "\n".join(lines)

  def expand(self, argv: Sequence[str]) -> list[str]:
    """Returns `argv` with the file of a recipe in place of its name.

    Raises:
      errors.ConfigError: if the recipe is not found.
    """
    words = list(argv)
    for i, word in enumerate(words):
      name, equals, value = word.partition("=")
      if name in _FLAG and equals:
        words[i] = f"{name}={launch_overrides.find_recipe(value)}"
      elif name in _FLAG and words[i + 1 :]:
        words[i + 1] = launch_overrides.find_recipe(words[i + 1])
    return words

  def suggest(self, argv: Sequence[str]) -> str:
    """Returns the known names that the unknown ones in `argv` stand for."""
    try:
      recipe = launch_overrides.find_recipe(self._recipe_of(argv))
      config = launch_overrides.load(recipe, [])
      keys = [key for key, _ in config_keys.values(config)]
    except errors.ConfigError:
      return f"Recipes are in configs/run, such as {self.recipe}."
    return override_names.advice(argv[1:], keys, flags.FLAGS)

  def _recipe_of(self, argv: Sequence[str]) -> str:
    """Returns the value of --config, or the usual recipe."""
    for word, after in zip(argv, [*argv[1:], ""], strict=True):
      name, equals, value = word.partition("=")
      if name in _FLAG:
        return value if equals else after
    return str(_ROOT / "configs/run" / self.recipe)
