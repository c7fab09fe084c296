# SPDX-License-Identifier: Apache-2.0
"""Every recipe's `:smoke` runs, in a small world that is made for it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).parents[2]
_ENVIRONMENT = {
  **os.environ,
  "PYTHONPATH": str(_ROOT),
  # One device; so short a run is over before faster code would pay.
  "XLA_FLAGS": "--xla_backend_optimization_level=0",
}
# These two make the world.
_WORLD = {"world_student": "student_run", "teacher_sft": "teacher_run"}
_GRPO = ("teacher_rcl", "teacher_rlt", "rlvr")
_SHORT = (
  "--config.loop.num_steps=1",
  "--config.batch.num_questions=4",
  "--config.evaluation.num_questions=4",
)


def _run(home, script, *options):
  result = subprocess.run(
    [sys.executable, "-m", f"scripts.{script}", *options],
    cwd=home,
    env=_ENVIRONMENT,
    capture_output=True,
    text=True,
    timeout=400,
    check=False,
  )
  assert result.returncode == 0, result.stderr


def _smoke(home, script, recipe, *options):
  """Runs a recipe where the world lies as the recipe has it; gives a folder."""
  config = f"--config=configs/run/{recipe}.py:smoke"
  _run(home, script, config, f"--workdir={home}/{recipe}", *options)
  return home / recipe


def _rows(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """Gives a folder with a world in which both models know a little."""
  home = tmp_path_factory.mktemp("home")
  (home / "configs").symlink_to(_ROOT / "configs")
  _run(home, "make_world", "--teacher", "--epochs=1")
  questions = home / ".cache/world/test.jsonl"
  few = questions.read_text().splitlines(keepends=True)[:40]
  questions.write_text("".join(few))
  return home


def test_no_recipe_is_left_out():
  recipes = {path.stem for path in (_ROOT / "configs/run").glob("[!_]*.py")}
  assert recipes == {*_WORLD, *_GRPO, "teacher_gkd", "teaching_eval"}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", _WORLD)
def test_sft_learns(home, recipe):
  workdir = home / ".cache/world" / _WORLD[recipe]
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
def test_gkd_comes_closer_to_its_teacher(home):
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
def test_evaluation_answers_every_question(home):
  workdir = _smoke(home, "evaluate", "teaching_eval")
  summary = json.loads((workdir / "summary.json").read_text())
  assert "teaching/NDR" in summary["all"]
  records = (workdir / "records.jsonl").read_text().splitlines()
  assert len(records) == 1 + 40
