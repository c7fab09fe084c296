# SPDX-License-Identifier: Apache-2.0
"""Every command that a text names can be run as it stands."""

import ast
import importlib
import pathlib
import re

import ml_collections
import pytest

from tests import tiny

_ROOT = pathlib.Path(__file__).parents[1]
_PACKAGES = ("atlas_jax", "conversion", "rollout", "configs", "scripts")
_RECIPES = sorted((_ROOT / "configs/run").glob("[!_]*.py"))

_MODULE = re.compile(r"-m ((?:scripts|atlas_jax)(?:\.\w+)+)")
_SHELL = re.compile(r"bash (scripts/\w+\.sh)")
_CONFIG = re.compile(r"--config=([\w/.]+?\.py)(?::(\w+))?(?![\w/])")
# In a table `tests/` may stand in its head instead.
_TEST = re.compile(r"`(?:tests/)?([\w/]+_test\.py)`")
_LINK = re.compile(r"\]\(([^)#:]+)\)")
_KEY = re.compile(r"--config\.([a-z_]\w*(?:\.[a-z_]\w*)*)")


def _strings(path):
  """Joins the string literals of a module, docstrings among them."""
  tree = ast.parse(path.read_text(encoding="utf-8"))
  return "\n".join(
    node.value
    for node in ast.walk(tree)
    if isinstance(node, ast.Constant) and isinstance(node.value, str)
  )


def _texts():
  """Yields every text that may name a command, by its file."""
  for path in sorted(_ROOT.glob("*.md")) + sorted(_ROOT.glob("docs/**/*.md")):
    if path.name != "STYLE.md":  # Its examples are of no recipe.
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
    # As a reference: a required value that is not set cannot be looked at.
    config = dict(config.items(preserve_field_references=True))[part]
  return True


def test_the_texts_hold_what_this_looks_for():
  assert len(_COMMANDS) > 5
  assert _MODULE.search(_TEXTS["scripts/train_sft.py"])
  assert _KEY.search(_TEXTS["configs/run/teacher_sft.py"])


@pytest.mark.parametrize("name", _TEXTS)
def test_every_script_that_is_named_exists(name):
  named = [
    *(f"{m.replace('.', '/')}.py" for m in _MODULE.findall(_TEXTS[name])),
    *_SHELL.findall(_TEXTS[name]),
  ]
  assert [path for path in named if not (_ROOT / path).is_file()] == []


@pytest.mark.parametrize(("name", "line"), _COMMANDS)
def test_every_command_names_a_config_and_keys_that_it_has(name, line):
  path, variant = _CONFIG.search(line).groups()
  assert (_ROOT / path).is_file(), f"{name} names {path}"
  config = _get_config(pathlib.Path(path), variant)
  missing = [key for key in _KEY.findall(line) if not _has(config, key)]
  assert not missing, f"{name}: {path} has no {missing}"


@pytest.mark.parametrize("name", _TEXTS)
def test_every_key_that_is_named_is_in_some_config(name):
  configs = [_get_config(p.relative_to(_ROOT), None) for p in _RECIPES]
  unknown = [
    key
    for key in _KEY.findall(_TEXTS[name])
    if not any(_has(config, key) for config in configs)
  ]
  assert unknown == []


@pytest.mark.parametrize("name", [n for n in _TEXTS if n.endswith(".md")])
def test_every_file_that_a_page_points_at_is_there(name):
  text, page = _TEXTS[name], (_ROOT / name).parent
  # The map of a package may name a test by its place beside another.
  tests = {path.name for path in (_ROOT / "tests").rglob("*_test.py")}
  gone = [
    test
    for test in _TEST.findall(text)
    if not (_ROOT / "tests" / test).is_file() and test not in tests
  ]
  gone += [to for to in _LINK.findall(text) if not (page / to).is_file()]
  assert gone == []


def _families(path):
  """Gives, of each test in a file that takes families, which it takes."""
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


_MODELS = _TEXTS["README.md"].partition("## Models")[2].partition("##")[0]


@pytest.mark.parametrize("row", re.findall(r"(?m)^\|.* x .*\|$", _MODELS))
def test_every_x_of_the_table_of_models_is_a_test_of_that_family(row):
  families = re.findall(r"\| `(\w+)`", _MODELS.partition("|---")[0])
  assert set(families) == set(tiny.FAMILIES)
  _, *marks, path = (cell.strip() for cell in row.strip("|").split("|"))
  held = {f for f, mark in zip(families, marks, strict=True) if mark == "x"}
  assert held in _families(path.strip("`"))


def test_the_table_of_recipes_has_every_recipe():
  (head,) = (
    line
    for line in _TEXTS["README.md"].splitlines()
    if line.startswith("|") and "`teacher_sft`" in line
  )
  # The small world's student is made by the recipe of a teacher.
  recipes = {path.stem for path in _RECIPES} - {"world_student"}
  assert set(re.findall(r"`(\w+)`", head)) == recipes
