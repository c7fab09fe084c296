# SPDX-License-Identifier: Apache-2.0
"""The quickstart, shortened, in a copy of the repository."""

import json
import os
import pathlib
import shutil
import subprocess

import pytest

_ROOT = pathlib.Path(__file__).parents[2]


def _quickstart(directory):
  environment = dict(os.environ)
  environment.pop("XLA_FLAGS", None)  # One device, as a user has it.
  return subprocess.run(
    ["bash", "scripts/quickstart.sh", "--epochs=1", "--steps=2"],
    cwd=directory,
    env=environment,
    capture_output=True,
    text=True,
    timeout=900,
    check=False,
  )


@pytest.mark.parametrize("argument", ["--rollout=sglang", "--step=2", "x"])
def test_an_unknown_argument_is_refused_before_anything_is_made(argument):
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
def test_quickstart_prints_its_table_and_then_reuses_what_exists(tmp_path):
  if not (_ROOT / ".venv/installed/trainer.txt").exists():
    pytest.skip("needs the .venv that scripts/run_tests.sh makes")
  copy = tmp_path / "repository"
  left_out = shutil.ignore_patterns(".*", "results", "__pycache__")
  shutil.copytree(_ROOT, copy, ignore=left_out)
  (copy / ".venv").symlink_to(_ROOT / ".venv")

  first = _quickstart(copy)

  assert first.returncode == 0, first.stderr[-3000:]
  assert "unknown" not in first.stdout
  for row in ("student alone", "taught after SFT", "taught after GRPO"):
    assert f"| {row}" in first.stdout
  results = copy / "results/quickstart"
  assert (results / "training.png").read_bytes().startswith(b"\x89PNG")
  metrics = (results / "grpo/metrics.jsonl").read_text().splitlines()
  assert json.loads(metrics[-1])["step"] == 2
  export = results / "grpo/export/model.safetensors"
  written = export.stat().st_mtime_ns

  second = _quickstart(copy)

  assert second.returncode == 0, second.stderr[-3000:]
  assert export.stat().st_mtime_ns == written
  assert "taught after GRPO" in second.stdout
