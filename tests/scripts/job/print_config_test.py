# SPDX-License-Identifier: Apache-2.0
"""Tests that every value of a config is printed with its origin."""

import os
import pathlib
import subprocess
import sys

import ml_collections
import pytest

from scripts import launch, launch_overrides
from scripts.job import print_config
from tests import processes

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
  assert rows["seed"] == ["5", "me"]
  assert rows["packing.length"] == ["128", recipe]
  assert rows["packing.too_long"] == ["'drop'", _SFT]


def test_the_launcher_shows_the_override_that_set_a_value(capsys):
  words = ["max_steps=4", "report_to=null", "--config.seed=1"]
  words += ["per_device_train_batch_size=16", "--print_config"]
  assert launch.main(["2", "teacher_rcl:smoke", *words]) == 0
  rows = _rows(capsys.readouterr().out)
  assert rows["loop.num_steps"] == ["4", "max_steps=4"]
  assert rows["report.to"] == ["'none'", "report_to=null"]
  assert rows["seed"] == ["1", "command", "line"]
  assert rows["mesh.fsdp"] == ["2", "launcher"]
  assert rows["batch.per_device"] == ["16", "launcher"]


@pytest.mark.slow
def test_a_closed_stdout_is_not_an_error():
  reading, writing = os.pipe()
  os.close(reading)
  code = "from scripts.job import print_config; print_config.show('a')"
  result = subprocess.run(
    [sys.executable, "-c", code],
    cwd=_ROOT,
    stdout=writing,
    stderr=subprocess.PIPE,
    timeout=120,
    check=False,
  )
  os.close(writing)
  assert (result.returncode, result.stderr) == (0, b"")


def test_secrets_are_masked(monkeypatch):
  values = {
    "api_key": "abc",
    "judge": {"token": "def", "max_completion_tokens": 7, "password": ""},
  }
  config = ml_collections.ConfigDict(values)
  monkeypatch.setattr(launch_overrides, "load", lambda *_: config)
  text = print_config.table("recipe.py", config, {})
  assert "abc" not in text
  assert "def" not in text
  assert _rows(text)["judge.max_completion_tokens"] == ["7", "recipe.py"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "rcl"])
def test_a_training_script_prints_the_config_and_exits(tmp_path, name):
  job = processes.Job(
    {"sft": "train_sft", "rcl": "train_grpo"}[name],
    [
      "--print_config",
      f"--config=configs/run/teacher_{name}.py:smoke",
      f"--workdir={tmp_path}/run",
      "--config.seed=5",
    ],
    split=True,
  )
  stdout, stderr = job.communicate(timeout=120)
  assert job.returncode == 0, stderr
  assert _rows(stdout)["seed"] == ["5", "command", "line"]
  assert not (tmp_path / "run").exists()
