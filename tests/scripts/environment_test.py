# SPDX-License-Identifier: Apache-2.0
"""Tests that an environment is installed once, and when its pins change.

Python is replaced by a shell script that records its arguments.
"""

import os
import pathlib
import subprocess

import pytest

_ENVIRONMENT = pathlib.Path(__file__).parents[2] / "scripts/environment.sh"
_PYTHON = """#!/bin/bash
[[ "$1" == -c ]] && exit {too_old}
echo "$*" >> {calls}
if [[ "$2" == venv ]]; then
  mkdir -p .venv/bin
  cp "$0" .venv/bin/python
  cp "$0" .venv/bin/pip
fi
[[ "$2" != pip || ! -e {calls}.fail ]]
"""


@pytest.fixture
def project(tmp_path):
  (tmp_path / "requirements").mkdir()
  for name in ("trainer", "test"):
    (tmp_path / "requirements" / f"{name}.txt").write_text(f"{name}==1\n")
  (tmp_path / "bin").mkdir()
  return tmp_path


def _add_python(project, name, *, too_old):
  path = project / "bin" / name
  path.write_text(_PYTHON.format(too_old=int(too_old), calls=project / "calls"))
  path.chmod(0o755)


def _ensure(project, *names):
  """Runs ensure_environment with only the project's Python in the PATH."""
  for tool in ("bash", "cmp", "cp", "mkdir"):
    link = project / "bin" / tool
    if not link.exists():
      link.symlink_to(_which(tool))
  return subprocess.run(
    ["bash", "-c", f"set -euo pipefail; . {_ENVIRONMENT}; {' '.join(names)}"],
    cwd=project,
    env={"PATH": str(project / "bin")},
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )


def _which(tool):
  for folder in os.environ["PATH"].split(os.pathsep):
    if os.access(pathlib.Path(folder) / tool, os.X_OK):
      return pathlib.Path(folder) / tool
  raise FileNotFoundError(tool)


def _calls(project):
  return (project / "calls").read_text().splitlines()


def test_a_too_old_python_is_exit_code_2_with_a_message(project):
  _add_python(project, "python3", too_old=True)
  result = _ensure(project, "ensure_environment", "trainer")
  assert result.returncode == 2
  assert "Python 3.11 or newer" in result.stderr
  assert not (project / ".venv").exists()


def test_an_installed_environment_is_left_alone(project):
  _add_python(project, "python3.11", too_old=True)
  _add_python(project, "python3", too_old=False)
  first = _ensure(project, "ensure_environment", "trainer", "test")
  assert first.returncode == 0, first.stderr
  venv, install = _calls(project)
  assert venv == "-m venv --clear .venv"
  assert install.endswith(
    "-r requirements/trainer.txt -r requirements/test.txt"
  )

  for names in (("trainer", "test"), ("trainer",)):
    again = _ensure(project, "ensure_environment", *names)
    assert (again.returncode, again.stdout) == (0, "")
  assert len(_calls(project)) == 2


def test_changed_pins_are_installed_into_the_same_environment(project):
  _add_python(project, "python3", too_old=False)
  _ensure(project, "ensure_environment", "trainer")
  (project / "requirements/trainer.txt").write_text("trainer==2\n")
  _ensure(project, "ensure_environment", "trainer")
  assert [call.split()[1] for call in _calls(project)] == ["venv", "pip", "pip"]


def test_a_failed_installation_is_retried(project):
  _add_python(project, "python3", too_old=False)
  (project / "calls.fail").touch()
  assert _ensure(project, "ensure_environment", "trainer").returncode != 0
  (project / "calls.fail").unlink()
  assert _ensure(project, "ensure_environment", "trainer").returncode == 0
  assert [call.split()[1] for call in _calls(project)] == ["venv", "pip", "pip"]
