# SPDX-License-Identifier: Apache-2.0
"""Tests that comments in config files are read as the meaning of their keys."""

import pytest

from scripts.job import config_keys

_SECTION = """
import ml_collections

def get_config():
  return ml_collections.ConfigDict(
    dict(  # train.loop.Settings
      steps=1,  # Steps to train.
      # Seconds a step may take:
      # 0 for no limit.
      limit_s=1.0,
      inner=dict(  # train.optimizer._lion
        beta=0.9,  # Decay.
      ),
      bare=1,
    )
  )
"""
_RECIPE = """
import ml_collections
from a_package import section, other

_TABLE = dict(other=other, section=section)

def get_config(variant="full"):
  config = ml_collections.ConfigDict()
  config.seed = 1  # Seed.
  config.loop = section.get_config()
  config.loop.steps = 2  # Why it is 2.
  config.update(_TABLE[variant].get_config())
  config.part = section.get_config().inner
  config.own = _own(3)
  if variant == "smoke":
    config.seed = 2
  return config

def _own(size):
  return dict(size=size)  # Rows.
"""
_OTHER = """
from a_package import section

def get_config():
  config = section.get_config()
  config.bare = 2
  return config
"""


@pytest.fixture
def keys(tmp_path, monkeypatch):
  package = tmp_path / "a_package"
  package.mkdir()
  (package / "__init__.py").write_text("")
  (package / "section.py").write_text(_SECTION)
  (package / "other.py").write_text(_OTHER)
  recipe = tmp_path / "recipe.py"
  recipe.write_text(_RECIPE)
  monkeypatch.syspath_prepend(tmp_path)
  return config_keys.read(recipe)


@pytest.mark.parametrize(
  ("name", "meaning", "reader", "file"),
  [
    ("seed", "Seed.", "", "recipe.py"),
    # An assignment changes the value and its origin, not the meaning.
    ("loop.steps", "Steps to train.", "train.loop.Settings", "recipe.py"),
    (
      "loop.limit_s",
      "Seconds a step may take: 0 for no limit.",
      "train.loop.Settings",
      "section.py",
    ),
    ("loop.inner.beta", "Decay.", "train.optimizer._lion", "section.py"),
    ("part.beta", "Decay.", "train.optimizer._lion", "section.py"),
    ("loop.bare", "", "train.loop.Settings", "section.py"),
    ("bare", "", "train.loop.Settings", "other.py"),
    ("own.size", "Rows.", "", "recipe.py"),
  ],
)
def test_a_comment_is_the_meaning_of_its_key(keys, name, meaning, reader, file):
  key = keys[name]
  assert (key.meaning, key.reader, key.file.name) == (meaning, reader, file)
