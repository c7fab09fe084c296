# SPDX-License-Identifier: Apache-2.0
"""Tests that values of a config are printed with origin and meaning."""

import pathlib

import ml_collections
import pytest

from scripts import launch, launch_overrides
from scripts.job import print_config

_ROOT = pathlib.Path(__file__).parents[3]
_SFT = "configs/run/teacher_sft.py"

# ml_collections loads config files with a deprecated importlib method.
pytestmark = pytest.mark.filterwarnings(
  "ignore:the load_module:DeprecationWarning"
)


@pytest.fixture(autouse=True)
def _root(monkeypatch):
  monkeypatch.chdir(_ROOT)


def _rows(text):
  return {line.split()[0]: line.split()[1:] for line in text.splitlines()}


def test_the_origin_is_the_recipe_its_variant_or_an_override():
  recipe = f"{_SFT}:smoke"
  config = launch_overrides.load(recipe, ["--config.seed=5"])
  rows = _rows(print_config.table(recipe, config, {"seed": "me"}))
  assert rows["seed"][:2] == ["5", "me"]
  assert rows["packing.length"][:2] == ["128", ":smoke"]
  assert rows["packing.too_long"][:2] == ["'drop'", "recipe"]
  assert rows["loop.max_nonfinite"][:2] == ["5", "default"]
  assert rows["loop.max_nonfinite"][2:5] == ["#", "Updates", "in"]


def test_the_launcher_shows_the_override_that_set_a_value(capsys):
  words = ["max_steps=4", "report_to=null", "--config.seed=1"]
  words += ["per_device_train_batch_size=16", "--print_config"]
  assert launch.main(["2", "teacher_rcl:smoke", *words]) == 0
  rows = _rows(capsys.readouterr().out)
  assert rows["loop.num_steps"][:2] == ["4", "max_steps=4"]
  assert rows["report.to"][:2] == ["'none'", "report_to=null"]
  assert rows["seed"][:2] == ["1", "flag"]
  assert rows["mesh.fsdp"][:2] == ["2", "launcher"]
  assert rows["batch.per_device"][:2] == ["16", "launcher"]


def test_secrets_are_masked(monkeypatch, tmp_path):
  values = {
    "api_key": "abc",
    "judge": {"token": "def", "max_completion_tokens": 7, "password": ""},
  }
  config = ml_collections.ConfigDict(values)
  monkeypatch.setattr(launch_overrides, "load", lambda *_: config)
  (tmp_path / "recipe.py").write_text("")
  text = print_config.table(f"{tmp_path}/recipe.py", config, {})
  assert "abc" not in text
  assert "def" not in text
  assert _rows(text)["judge.max_completion_tokens"] == ["7", "recipe"]
