# SPDX-License-Identifier: Apache-2.0
"""A short quickstart, then every recipe's `:smoke` variant in its world.

Everything runs in a copy of the repository.
"""

import importlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests import quick_compile

_ROOT = pathlib.Path(__file__).parents[2]
# One device, as users have.
_ENVIRONMENT = {**os.environ, "XLA_FLAGS": quick_compile.XLA_FLAGS}
# Smaller sizes, by file: nothing here depends on what the models learn.
_SMALLER = {
  "scripts/small_world.py": {
    '"train": 3000, "teacher": 2500,': '"train": 160, "teacher": 500,',
    '"validation": 100, "test": 400': '"validation": 16, "test": 40',
  },
  "scripts/make_world.py": {"width=128": "width=64"},
  "configs/run/teacher_sft.py": {"dict(size=32,": "dict(size=8,"},
  "configs/run/teacher_rcl.py": {
    "num_questions = 16": "num_questions = 4",
    "per_device = 48": "per_device = 12",
    "max_rows = 128": "max_rows = 32",
  },
}
# The last two run in the quickstart, the others with these options.
_WORLD = {"world_student": "student_run", "teacher_sft": "teacher_run"}
_GRPO = ("teacher_rlt", "rlvr")
_IN_QUICKSTART = ("teacher_rcl", "teaching_eval")
_SHORT = (
  "--config.loop.num_steps=1",
  "--config.evaluation.num_questions=4",
)
# Rewards that differ, whatever the models have learnt.
_DISTINCT = (
  "--reward_fn=tests.reward_functions:sum_token_ids",
  "--config.batch.mask_truncated=False",
)


def _run(home, *command, timeout=400):
  """Runs a command that must succeed; returns its stdout."""
  result = subprocess.run(
    command,
    cwd=home,
    env=_ENVIRONMENT,
    capture_output=True,
    text=True,
    timeout=timeout,
    check=False,
  )
  assert result.returncode == 0, result.stderr[-3000:]
  return result.stdout


def _quickstart(home):
  command = ("bash", "scripts/quickstart.sh", "--epochs=1", "--steps=2")
  return _run(home, *command, timeout=900)


def _smoke(home, script, recipe, *options):
  """Runs a recipe in the default world; returns its workdir."""
  _run(
    home,
    sys.executable,
    "-m",
    f"scripts.{script}",
    f"--config=configs/run/{recipe}.py:smoke",
    f"--workdir={home}/{recipe}",
    *options,
  )
  return home / recipe


def _rows(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
  """Returns a smaller copy of the repository, and its quickstart's stdout."""
  if not (_ROOT / ".venv/installed/trainer.txt").exists():
    pytest.skip("needs the .venv that scripts/run_tests.sh creates")
  home = tmp_path_factory.mktemp("home") / "repository"
  ignored = shutil.ignore_patterns(".*", "results", "__pycache__")
  shutil.copytree(_ROOT, home, ignore=ignored)
  (home / ".venv").symlink_to(_ROOT / ".venv")
  for name, changes in _SMALLER.items():
    text = (home / name).read_text()
    for size, smaller in changes.items():
      assert size in text
      text = text.replace(size, smaller)
    (home / name).write_text(text)
  return home, _quickstart(home)


@pytest.fixture(scope="module")
def home(quickstart):
  """Returns a repository whose world has two models trained for one epoch."""
  home, _ = quickstart
  command = (sys.executable, "-m", "scripts.make_world")
  _run(home, *command, "--teacher", "--epochs=1")
  return home


@pytest.mark.parametrize("argument", ["--rollout=sglang", "--step=2", "x"])
def test_an_unknown_argument_is_rejected_before_any_work(argument):
  result = subprocess.run(
    ["bash", _ROOT / "scripts/quickstart.sh", argument],
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  assert result.returncode == 2
  assert f"Unknown argument {argument}" in result.stderr
  assert not result.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_quickstart_prints_its_table_then_reuses_results(quickstart):
  home, stdout = quickstart
  assert "unknown" not in stdout
  for row in ("student alone", "taught after SFT", "taught after GRPO"):
    assert f"| {row}" in stdout
  results = home / "results/quickstart"
  assert (results / "training.png").read_bytes().startswith(b"\x89PNG")
  first, *_, last = _rows(results / "grpo")
  assert first["rewards/unavailable"] == 0
  assert last["step"] == 2
  assert "eval/teaching/NDR" in last
  export = results / "grpo/export/model.safetensors"
  written = export.stat().st_mtime_ns

  stdout = _quickstart(home)

  assert export.stat().st_mtime_ns == written
  assert "taught after GRPO" in stdout


def test_every_recipe_is_tested():
  recipes = {path.stem for path in (_ROOT / "configs/run").glob("[!_]*.py")}
  assert recipes == {*_WORLD, *_GRPO, *_IN_QUICKSTART, "teacher_gkd"}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [*_GRPO, *_IN_QUICKSTART, "teacher_gkd"])
def test_default_paths_of_a_recipe_exist_in_the_world(home, recipe):
  module = importlib.import_module(f"configs.run.{recipe}")
  config = module.get_config("smoke")
  for section in ("model", "student", "teacher", "data", "held_out"):
    if section in config and config[section].path:
      assert (home / config[section].path).exists()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", _WORLD)
def test_sft_lowers_its_loss(home, recipe):
  workdir = home / ".cache/world" / _WORLD[recipe]
  first, *_, last = [row["loss"] for row in _rows(workdir) if "loss" in row]
  assert last < first
  assert (workdir / "export/model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", _GRPO)
def test_grpo_takes_a_step(home, recipe):
  workdir = _smoke(home, "train_grpo", recipe, *_SHORT, *_DISTINCT)
  first = _rows(workdir)[0]
  assert first["num_tokens"] > 0
  assert first["grad_norm"] > 0
  assert first["rewards/unavailable"] == 0
  assert (workdir / "export/model.safetensors").exists()


@pytest.mark.slow
def test_gkd_lowers_its_loss(home):
  workdir = _smoke(
    home,
    "train_gkd",
    "teacher_gkd",
    "--config.batch.num_prompts=16",
    "--config.loop.num_steps=8",
    "--config.loop.log_every=1",
    "--config.loop.eval_every=4",
  )
  rows = _rows(workdir)
  first, *_, last = [row["loss"] for row in rows if "loss" in row]
  assert last < first
  assert {row["on_policy"] for row in rows if "loss" in row} == {0.0, 1.0}
  first, last = [row["eval/loss"] for row in rows if "eval/loss" in row]
  assert last < first
  assert (workdir / "export/model.safetensors").exists()


@pytest.mark.slow
def test_evaluation_answers_every_question(quickstart):
  workdir = quickstart[0] / "results/quickstart/eval_grpo"
  summary = json.loads((workdir / "summary.json").read_text())
  assert "teaching/NDR" in summary["all"]
  assert summary["all"]["teaching/num_paraphrases"] == 40
  records = (workdir / "records.jsonl").read_text().splitlines()
  assert len(records) == 1 + 40
