# SPDX-License-Identifier: Apache-2.0
"""An environment is created once, and updated only when its pins change.

Python is a shell script in these tests: it has one version and records its
calls.
"""

import os
import pathlib
import subprocess

import pytest

_ENVIRONMENT = pathlib.Path(__file__).parents[2] / "scripts/environment.sh"
_PYTHON = """#!/bin/bash
[[ "$1" == -c ]] && {{ [[ "$2" == *"'{version}'"* ]]; exit; }}
echo "$*" >> {calls}
if [[ "$2" == venv ]]; then
  mkdir -p "$4/bin"
  cp "$0" "$4/bin/python"
  cp "$0" "$4/bin/pip"
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


def _add_python(project, name, version):
  path = project / name
  path.parent.mkdir(parents=True, exist_ok=True)
  text = _PYTHON.format(version=version, calls=project / "calls")
  path.write_text(text)
  path.chmod(0o755)


def _run(project, *words):
  """Runs a line of shell that finds no Python but the project's."""
  for tool in ("bash", "cmp", "cp", "mkdir"):
    link = project / "bin" / tool
    if not link.exists():
      link.symlink_to(_which(tool))
  return subprocess.run(
    ["bash", "-c", f"set -euo pipefail; . {_ENVIRONMENT}; {' '.join(words)}"],
    cwd=project,
    env={"PATH": str(project / "bin"), "HOME": str(project)},
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


def test_a_missing_python_is_exit_code_2_with_a_message(project):
  _add_python(project, "bin/python3", "3.10")
  result = _run(project, "ensure_environment", "trainer")
  assert result.returncode == 2
  assert "Python 3.12 3.11 was not found" in result.stderr
  assert not (project / ".venv").exists()


@pytest.mark.parametrize(
  ("found", "expected"),
  [
    ({"bin/python3.11": "3.11", "bin/python3.12": "3.12"}, "python3.12"),
    ({"bin/python3": "3.12", "bin/python3.11": "3.11"}, "python3"),
    # The name that a version manager leaves on PATH for a missing version.
    ({"bin/python3.12": "", "bin/python3.11": "3.11"}, "python3.11"),
    (
      {
        "bin/python3": "3.11",
        ".pyenv/versions/3.12.1/bin/python": "3.12",
      },
      "{home}/.pyenv/versions/3.12.1/bin/python",
    ),
    (
      {".local/share/uv/python/cpython-3.12.9-linux/bin/python3": "3.12"},
      "{home}/.local/share/uv/python/cpython-3.12.9-linux/bin/python3",
    ),
  ],
)
def test_python_3_12_comes_before_3_11_wherever_it_is(project, found, expected):
  for name, version in found.items():
    _add_python(project, name, version or "none")
  result = _run(project, "find_python")
  assert result.stdout.strip() == expected.format(home=project)


def test_a_version_can_be_chosen(project):
  _add_python(project, "bin/python3.12", "3.12")
  _add_python(project, "bin/python3", "3.11")
  line = "environment=.venv-3.11 python_version=3.11 ensure_environment trainer"
  assert _run(project, line).returncode == 0
  assert _calls(project)[0] == "-m venv --clear .venv-3.11"
  assert (project / ".venv-3.11/installed/trainer.txt").exists()


def test_second_time_does_nothing(project):
  _add_python(project, "bin/python3.12", "3.12")
  first = _run(project, "ensure_environment", "trainer", "test")
  assert first.returncode == 0, first.stderr
  venv, install = _calls(project)
  assert venv == "-m venv --clear .venv"
  assert install.endswith(
    "-r requirements/trainer.txt -r requirements/test.txt"
  )

  for names in (("trainer", "test"), ("trainer",)):
    again = _run(project, "ensure_environment", *names)
    assert (again.returncode, again.stdout) == (0, "")
  assert len(_calls(project)) == 2


def test_changed_pins_are_installed_into_the_same_environment(project):
  _add_python(project, "bin/python3", "3.12")
  _run(project, "ensure_environment", "trainer")
  (project / "requirements/trainer.txt").write_text("trainer==2\n")
  _run(project, "ensure_environment", "trainer")
  assert [call.split()[1] for call in _calls(project)] == ["venv", "pip", "pip"]


def test_real_models_are_installed_without_their_dependencies(project):
  _add_python(project, "bin/python3", "3.12")
  (project / "requirements/real.txt").write_text("gguf==1\n")
  _run(project, "ensure_environment", "trainer; ensure_real")
  (project / "requirements/trainer.txt").write_text("trainer==2\n")
  _run(project, "ensure_environment", "trainer; ensure_real")
  installs = [call for call in _calls(project) if "install" in call]
  assert ["--no-deps" in call for call in installs] == [False, True, False]
  assert installs[1].endswith("-r requirements/real.txt")


def test_a_failed_installation_is_tried_again(project):
  _add_python(project, "bin/python3", "3.12")
  (project / "calls.fail").touch()
  assert _run(project, "ensure_environment", "trainer").returncode != 0
  (project / "calls.fail").unlink()
  assert _run(project, "ensure_environment", "trainer").returncode == 0
  assert [call.split()[1] for call in _calls(project)] == ["venv", "pip", "pip"]
