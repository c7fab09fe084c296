# SPDX-License-Identifier: Apache-2.0
"""Prints `docs/config.md`: every config key of every recipe.

python -m scripts.config_docs > docs/config.md
"""

from collections.abc import Iterator, Sequence
import importlib
import pathlib
from typing import Any, NamedTuple

from scripts.job import config_keys

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_RECIPES = (
  "teacher_sft",
  "teacher_rcl",
  "teacher_rlt",
  "rlvr",
  "teacher_gkd",
  "teaching_eval",
  "answer_eval",
)
_MAX_VALUE = 60
_BAR = "\\|"  # A bar in a cell.
_HEAD = """\
# Config keys

After this page you can find any setting of a recipe: what it means, its default
and what reads it. Set a key with `--config.KEY=VALUE`:

```sh
python -m scripts.train_sft --config=configs/run/teacher_sft.py \\
  --workdir=results/sft --config.schedule.learning_rate=2e-5 \\
  --config.batch.size=32
```

`--print_config` prints every key of a recipe with its value, origin (flag,
variant, recipe or default) and meaning, without a run or a workdir. An unknown
key is an error that suggests the right one, also for names of TRL and verl.
Precisions may be short: `bf16` is `bfloat16`, `fp32` is `float32`.

Defaults are those of the recipes without a variant. The first one holds in
every recipe of the section that is not named. Names in "read by" without
`scripts.` or `rollout.` are below `atlas_jax`. This page is generated from the
comments in `configs/`: `python -m scripts.config_docs > docs/config.md`.
"""


def markdown() -> str:
  """Returns the text of `docs/config.md`."""
  sections: dict[str, list[_Row]] = {}
  for row in _rows():
    section = row.name.partition(".")[0] if "." in row.name else ""
    sections.setdefault(section, []).append(row)
  lines = [_HEAD]
  for section, rows in sections.items():
    recipes = [r for r in _RECIPES if any(r in row.values for row in rows)]
    where = "all recipes" if len(recipes) == len(_RECIPES) else _list(recipes)
    lines += [
      f"## Section `{section}`" if section else "## Keys without a section",
      "",
      f"In {where}.",
      "",
      "| key | default | meaning | read by |",
      "|---|---|---|---|",
      *(row.markdown(recipes) for row in rows),
      "",
    ]
  return "\n".join(lines)


class _Row(NamedTuple):
  """A key, and its default in each recipe that has it."""

  name: str
  key: config_keys.Key
  values: dict[str, Any]  # Any: a config value.

  def markdown(self, recipes: Sequence[str]) -> str:
    """Returns the row of a table of keys of `recipes`."""
    reader = f"`{self.key.reader}`" if self.key.reader else "the script"
    cells = f"`{self.name}`", self._defaults(recipes), self.key.meaning, reader
    return f"| {' | '.join(cell.replace('|', _BAR) for cell in cells)} |"

  def _defaults(self, recipes: Sequence[str]) -> str:
    """Lists the defaults, the most frequent first, with their recipes."""
    by_value: dict[str, list[str]] = {}
    for recipe, value in self.values.items():
      by_value.setdefault(self._format(value), []).append(recipe)
    first, *others = sorted(by_value, key=lambda text: -len(by_value[text]))
    is_everywhere = len(self.values) == len(recipes)
    return "; ".join(
      [
        first if is_everywhere else f"{first} in {_list(by_value[first])}",
        *(f"{text} in {_list(by_value[text])}" for text in others),
      ]
    )

  def _format(self, value: Any) -> str:
    text = repr(value)
    if len(text) > _MAX_VALUE:
      return f"see `{self.key.file.resolve().relative_to(_ROOT)}`"
    return f"`{text}`"


def _rows() -> Iterator[_Row]:
  """Yields each key once; twice if its meaning or reader differs by recipe."""
  rows: dict[tuple[str, str, str], _Row] = {}
  for recipe in _RECIPES:
    path = _ROOT / f"configs/run/{recipe}.py"
    module = importlib.import_module(f"configs.run.{recipe}")
    config = dict(config_keys.values(module.get_config()))
    for name, key in config_keys.read(path).items():
      if name in config:
        same = (name, key.meaning, key.reader)
        row = rows.setdefault(same, _Row(name, key, {}))
        row.values[recipe] = config[name]
  yield from rows.values()


def _list(recipes: Sequence[str]) -> str:
  return ", ".join(f"`{recipe}`" for recipe in recipes)


if __name__ == "__main__":
  print(markdown(), end="")
