# SPDX-License-Identifier: Apache-2.0
"""Builds the wheel, installs it, and trains outside the checkout."""

import os
import pathlib
import shutil
import subprocess
import sys
import venv

import pytest

from tests import quick_compile

_ROOT = pathlib.Path(__file__).parents[2]


def _run(*command, cwd):
  result = subprocess.run(
    [str(word) for word in command],
    cwd=cwd,
    env={**os.environ, "XLA_FLAGS": quick_compile.XLA_FLAGS},
    capture_output=True,
    text=True,
    timeout=400,
    check=False,
  )
  assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
  return result.stdout + result.stderr


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
  """Returns the folder of the commands of an environment with the wheel.

  It has nothing of ours but the wheel. The libraries are those of this
  environment: installing them again would take minutes and test nothing.
  """
  home = tmp_path_factory.mktemp("installed")
  source = home / "source"
  for name in ("atlas_jax", "conversion", "rollout", "configs", "scripts"):
    shutil.copytree(_ROOT / name, source / name)
  for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(_ROOT / name, source)
  pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
  build = ("wheel", "--no-deps", "--no-build-isolation", "-w", home, source)
  _run(*pip, *build, cwd=home)
  (wheel,) = home.glob("*.whl")
  venv.create(home / "venv", with_pip=False, symlinks=True)
  python = home / "venv/bin/python"
  install = ("install", "--no-deps", "--no-index", wheel)
  _run(*pip, "--python", python, *install, cwd=home)
  (packages,) = (home / "venv/lib").glob("python*/site-packages")
  libraries = pathlib.Path(pytest.__file__).parents[1]
  (packages / "libraries.pth").write_text(f"{libraries}\n")
  return home / "venv/bin"


@pytest.mark.slow
def test_an_installed_recipe_trains_in_any_folder(commands, tmp_path):
  log = _run(
    commands / "atlas-train-sft",
    "--config=teacher_sft:smoke",
    "--workdir=run",
    "--config.num_epochs=0",
    "--config.loop.num_steps=2",
    cwd=tmp_path,
  )
  assert "step 2/2" in log
  assert (tmp_path / "run/export/model.safetensors").exists()
  listing = _run(commands / "atlas-convert", "inspect", "run", cwd=tmp_path)
  assert "embed" in listing


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train-grpo", "serve", "launch", "doctor"])
def test_installed_commands_print_help(commands, tmp_path, name):
  assert _run(commands / f"atlas-{name}", "--help", cwd=tmp_path)
