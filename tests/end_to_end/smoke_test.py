# SPDX-License-Identifier: Apache-2.0
"""Runs the quickstart, and every recipe's `:smoke` variant in its world.

Everything runs in copies of the repository, with smaller sizes.
"""

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
# Smaller sizes, by file.
_FEWER = {
  "scripts/small_world.py": {
    '"validation": 100, "test": 400': '"validation": 16, "test": 40'
  },
  "configs/run/teacher_rcl.py": {
    "num_questions = 16": "num_questions = 4",
    "per_device = 48": "per_device = 12",
    "max_rows = 128": "max_rows = 32",
  },
}
# Nothing in the quickstart's test depends on what its models learn.
_SMALLER = {
  "scripts/small_world.py": {
    '"train": 3000, "teacher": 2500,': '"train": 160, "teacher": 500,',
    '"validation": 100, "test": 400': '"validation": 16, "test": 40',
    "width=128": "width=64",
  },
  "configs/run/teacher_sft.py": {"dict(size=32,": "dict(size=8,"},
  "configs/run/teacher_rcl.py": _FEWER["configs/run/teacher_rcl.py"],
}
# The quickstart's workdirs of the recipes that train its models by SFT.
_SFT = {
  "world_student": ".cache/world/student_run",
  "teacher_sft": "results/quickstart/sft",
}
_GRPO = ("teacher_rcl", "teacher_rlt", "rlvr")
# And how many of the 40 held-out problems have an answer to their paraphrase.
_EVALUATIONS = {"teaching_eval": 40, "answer_eval": 0}
_SHORT = (
  "--config.loop.num_steps=1",
  "--config.evaluation.num_questions=4",
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


def _copy(home, smaller):
  """Copies the repository with smaller sizes, and without any results."""
  if not (_ROOT / ".venv/installed/trainer.txt").exists():
    pytest.skip("needs the .venv that scripts/run_tests.sh creates")
  ignored = shutil.ignore_patterns(".*", "results", "__pycache__")
  shutil.copytree(_ROOT, home, ignore=ignored)
  (home / ".venv").symlink_to(_ROOT / ".venv")
  for name, changes in smaller.items():
    text = (home / name).read_text()
    for size, smaller in changes.items():
      assert size in text
      text = text.replace(size, smaller)
    (home / name).write_text(text)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
  """Returns a smaller copy of the repository, and its quickstart's stdout."""
  home = tmp_path_factory.mktemp("quickstart") / "repository"
  _copy(home, _SMALLER)
  return home, _quickstart(home)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """Returns a copy of the repository without a world: recipes write theirs."""
  home = tmp_path_factory.mktemp("home") / "repository"
  _copy(home, _FEWER)
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
  assert recipes == {*_SFT, *_GRPO, *_EVALUATIONS, "teacher_gkd"}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", _SFT)
def test_sft_lowers_its_loss(quickstart, recipe):
  workdir = quickstart[0] / _SFT[recipe]
  first, *_, last = [row["loss"] for row in _rows(workdir) if "loss" in row]
  assert last < first
  assert (workdir / "export/model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", _GRPO)
def test_grpo_takes_a_step(home, recipe):
  workdir = _smoke(home, "train_grpo", recipe, *_SHORT)
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
@pytest.mark.parametrize("recipe", _EVALUATIONS)
def test_evaluation_answers_every_question(home, recipe):
  workdir = _smoke(home, "evaluate", recipe)
  summary = json.loads((workdir / "summary.json").read_text())["all"]
  assert ("teaching/NDR" in summary) == (recipe == "teaching_eval")
  assert summary.get("teaching/num_paraphrases", 0) == _EVALUATIONS[recipe]
  records = (workdir / "records.jsonl").read_text().splitlines()
  assert len(records) == 1 + 40
