# SPDX-License-Identifier: Apache-2.0
"""Checks commands, config keys, links and tables of the documentation."""

import ast
import dataclasses
import importlib
import pathlib
import re

import ml_collections
import pytest

from atlas_jax import types
from tests import tiny

_ROOT = pathlib.Path(__file__).parents[1]
_PACKAGES = ("atlas_jax", "conversion", "rollout", "configs", "scripts")
_RECIPES = sorted((_ROOT / "configs/run").glob("[!_]*.py"))

_MODULE = re.compile(r"-m ((?:scripts|atlas_jax)(?:\.\w+)+)")
_SHELL = re.compile(r"bash (scripts/\w+\.sh)")
_CONFIG = re.compile(r"--config=([\w/.]+?\.py)(?::(\w+))?(?![\w/])")
# A table may name `tests/` in its header instead of in every row.
_TEST = re.compile(r"`(?:tests/)?([\w/]+_test\.py)`")
_LINK = re.compile(r"\]\(([^)#:]+)\)")
_KEY = re.compile(r"--config\.([a-z_]\w*(?:\.[a-z_]\w*)*)")


def _strings(path):
  """Returns the string literals of a module, including docstrings."""
  tree = ast.parse(path.read_text(encoding="utf-8"))
  return "\n".join(
    node.value
    for node in ast.walk(tree)
    if isinstance(node, ast.Constant) and isinstance(node.value, str)
  )


def _texts():
  """Yields the path and text of every file that may contain a command."""
  for path in sorted(_ROOT.glob("*.md")) + sorted(_ROOT.glob("docs/**/*.md")):
    if path.name != "STYLE.md":  # Its examples belong to no recipe.
      yield path, path.read_text(encoding="utf-8")
  for path in sorted(_ROOT.glob("scripts/*.sh")):
    yield path, path.read_text(encoding="utf-8")
  for package in _PACKAGES:
    for path in sorted((_ROOT / package).rglob("*.py")):
      yield path, _strings(path)


_TEXTS = {
  path.relative_to(_ROOT).as_posix(): text.replace("\\\n", " ")
  for path, text in _texts()
}
_COMMANDS = [
  (name, line.strip())
  for name, text in _TEXTS.items()
  for line in text.splitlines()
  if _CONFIG.search(line)
]


def _get_config(path, variant):
  module = importlib.import_module(".".join(path.with_suffix("").parts))
  return module.get_config(variant) if variant else module.get_config()


def _has(config, key):
  for part in key.split("."):
    if not isinstance(config, ml_collections.ConfigDict) or part not in config:
      return False
    # References are kept, since reading an unset required value raises.
    config = dict(config.items(preserve_field_references=True))[part]
  return True


def test_patterns_match_known_texts():
  assert len(_COMMANDS) > 5
  assert _MODULE.search(_TEXTS["scripts/train_sft.py"])
  assert _KEY.search(_TEXTS["configs/run/teacher_sft.py"])


@pytest.mark.parametrize("name", _TEXTS)
def test_named_scripts_exist(name):
  named = [
    *(f"{m.replace('.', '/')}.py" for m in _MODULE.findall(_TEXTS[name])),
    *_SHELL.findall(_TEXTS[name]),
  ]
  assert [path for path in named if not (_ROOT / path).is_file()] == []


@pytest.mark.parametrize(("name", "line"), _COMMANDS)
def test_commands_use_existing_configs_and_keys(name, line):
  path, variant = _CONFIG.search(line).groups()
  assert (_ROOT / path).is_file(), f"{name} names {path}"
  config = _get_config(pathlib.Path(path), variant)
  missing = [key for key in _KEY.findall(line) if not _has(config, key)]
  assert not missing, f"{name}: {path} has no {missing}"


@pytest.mark.parametrize("name", _TEXTS)
def test_named_keys_exist_in_some_config(name):
  configs = [_get_config(p.relative_to(_ROOT), None) for p in _RECIPES]
  unknown = [
    key
    for key in _KEY.findall(_TEXTS[name])
    if not any(_has(config, key) for config in configs)
  ]
  assert unknown == []


@pytest.mark.parametrize("name", [n for n in _TEXTS if n.endswith(".md")])
def test_linked_files_exist(name):
  text, page = _TEXTS[name], (_ROOT / name).parent
  # A page may also name a test by its file name alone.
  tests = {path.name for path in (_ROOT / "tests").rglob("*_test.py")}
  gone = [
    test
    for test in _TEST.findall(text)
    if not (_ROOT / "tests" / test).is_file() and test not in tests
  ]
  gone += [to for to in _LINK.findall(text) if not (page / to).is_file()]
  assert gone == []


def _families(path):
  """Returns the families of each test in a file that is run by family."""
  name = ".".join(("tests", *pathlib.Path(path).with_suffix("").parts))
  found = []
  for test in vars(importlib.import_module(name)).values():
    for mark in getattr(test, "pytestmark", ()):
      names = mark.args[0] if mark.name == "parametrize" else ()
      if names == "family":
        found.append(set(mark.args[1]))
      elif "family" in names:
        found.append({row[names.index("family")] for row in mark.args[1]})
  return found


def _section(page, heading):
  """Returns the text below a second-level heading, up to the next one."""
  text = _TEXTS[page].partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
  assert text, f"{page} has no section {heading!r}."
  return text


def _rows(text):
  """Returns the cells of each table row, without the table's header."""
  rows = text.partition("|---")[2].splitlines()[1:]
  return [
    [cell.strip() for cell in row.strip("|").split("|")]
    for row in rows
    if row.startswith("|")
  ]


_MODELS = _section("docs/models.md", "Tested features by family")


@pytest.mark.parametrize("row", _rows(_MODELS), ids=lambda row: row[0])
def test_every_x_in_the_table_of_models_is_a_test_of_that_family(row):
  families = re.findall(r"\| `(\w+)`", _MODELS.partition("|---")[0])
  assert set(families) == set(tiny.FAMILIES)
  _, *marks, path = row
  held = {f for f, mark in zip(families, marks, strict=True) if mark == "x"}
  assert held in _families(path.strip("`"))


def test_the_tables_of_recipes_have_every_recipe():
  # The small world's student is trained by a recipe of its own.
  recipes = {path.stem for path in _RECIPES} - {"world_student"}
  table = _section("docs/recipes.md", "Features by recipe")
  head = table.partition("|---")[0]
  assert set(re.findall(r"\| `(\w+)`", head)) == recipes
  for text in (
    _section("docs/recipes.md", "List of recipes").partition("\n\n`")[0],
    _section("README.md", "Recipes"),
  ):
    assert set(re.findall(r"configs/run/([a-z_]+)\.py", text)) == recipes


_STAGES = _rows(_section("docs/grpo_step.md", "Stages"))
_BEHIND = _rows(_section("docs/grpo_step.md", "Behind the interfaces"))


@pytest.mark.parametrize(
  "row", [*_STAGES, *_BEHIND], ids=lambda row: f"{row[2]}-{row[1]}"
)
def test_functions_of_the_grpo_step_are_defined_in_their_file(row):
  _, functions, path = row
  tree = ast.parse((_ROOT / path.strip("`")).read_text(encoding="utf-8"))
  kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
  defined = {n.name for n in ast.walk(tree) if isinstance(n, kinds)}
  # Of a method, only its own name is checked.
  named = {name.split(".")[-1] for name in re.findall(r"`([\w.]+)`", functions)}
  assert named
  assert named <= defined


def test_the_page_of_rewards_lists_every_field_of_a_record():
  text = _TEXTS["docs/rewards.md"].partition("### Fields of a record")[2]
  named = set(re.findall(r"\w+", text.partition("\n## ")[0]))
  classes = (types.TeachingRecord, types.Question, types.Attempt)
  fields = [
    field.name for kind in classes for field in dataclasses.fields(kind)
  ]
  assert [name for name in fields if name not in named] == []


def test_the_grpo_step_is_short_enough_to_read():
  paths = {path.strip("`") for _, _, path in _STAGES}
  lines = [
    line
    for path in paths
    for line in (_ROOT / path).read_text(encoding="utf-8").splitlines()
  ]
  assert len(paths) <= 14
  assert len(lines) <= 3000
