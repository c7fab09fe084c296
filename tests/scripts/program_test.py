# SPDX-License-Identifier: Apache-2.0
"""Tests the exit code and the error message of every way to exit."""

import os
import pathlib
import subprocess
import sys

import pytest

_FOUR = 'errors.{}("What.", where="here", why="so", fix="that")'
_ROOT = pathlib.Path(__file__).parents[2]
_SCRIPT = """
\'\'\'Counts.

  count --number=1 \\
    --more
\'\'\'

import sys
from absl import flags, logging
from atlas_jax import errors
from scripts import program

flags.DEFINE_integer("number", 1, "Any.")

def main():
  logging.info("of ours")
  {}

program.run(main)
"""


def _run(line, *arguments, **environment):
  return subprocess.run(
    [sys.executable, "-c", _SCRIPT.format(line), *arguments],
    env={**os.environ, **environment},
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )


@pytest.mark.parametrize(
  ("kind", "code"),
  [
    ("ConfigError", 2),
    ("DataError", 3),
    ("DivergedError", 4),
    ("CheckpointError", 5),
    ("PreemptedError", 75),
  ],
)
def test_a_known_failure_is_reported_in_four_lines(kind, code):
  result = _run("raise " + _FOUR.format(kind))
  assert result.returncode == code
  message = "\nWhat.\n  where: here\n  why  : so\n  fix  : that\n"
  assert result.stderr.endswith(message)
  assert "Traceback" not in result.stderr


def test_an_unexpected_exception_shows_its_traceback():
  result = _run('raise ValueError("odd")')
  assert result.returncode == 70
  assert "Traceback" in result.stderr
  assert "ValueError: odd" in result.stderr


def test_an_interrupt_has_the_exit_code_of_preemption():
  result = _run("raise KeyboardInterrupt")
  assert result.returncode == 75
  assert "Run the same command again" in result.stderr
  assert "Traceback" not in result.stderr


def test_a_failure_with_a_closed_stderr_keeps_its_exit_code():
  reading, writing = os.pipe()
  os.close(reading)
  for line, code in ((_FOUR.format("DataError"), 3), ('ValueError("odd")', 70)):
    process = subprocess.run(
      [sys.executable, "-c", _SCRIPT.format(f"raise {line}")],
      stdout=writing,
      stderr=writing,
      timeout=60,
      check=False,
    )
    assert process.returncode == code
  os.close(writing)


@pytest.mark.parametrize(
  "line", ["print('a')", "print('a' * 10**6)", "print('a', flush=True)"]
)
def test_a_closed_stdout_ends_the_output_without_an_error(line):
  reading, writing = os.pipe()
  os.close(reading)
  process = subprocess.run(
    [sys.executable, "-c", _SCRIPT.format(line)],
    stdout=writing,
    stderr=subprocess.PIPE,
    timeout=60,
    check=False,
  )
  os.close(writing)
  assert process.returncode == 0
  assert process.stderr.splitlines()[1:] == []  # The first one is logged.


def test_a_broken_pipe_elsewhere_is_an_unexpected_exception():
  result = _run("raise BrokenPipeError")
  assert result.returncode == 70
  assert "Traceback" in result.stderr


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_platform_without_a_device_is_an_error_of_the_command(platform):
  result = _run("import jax; jax.devices()", JAX_PLATFORMS=platform)
  assert result.returncode == 2
  assert f"where: JAX_PLATFORMS={platform}" in result.stderr
  assert "Traceback" not in result.stderr


_INTERRUPT_AT_JAX = """
import os, signal, sys

class Finder:
  def find_spec(self, name, path=None, target=None):
    if name == "jax":
      os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
"""


def test_an_interrupt_while_importing_is_one_line(tmp_path):
  (tmp_path / "sitecustomize.py").write_text(_INTERRUPT_AT_JAX)
  result = subprocess.run(
    [sys.executable, "-m", "scripts.train_sft", "--help"],
    cwd=_ROOT,
    env={**os.environ, "PYTHONPATH": str(tmp_path)},
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  assert result.returncode == 130
  assert result.stderr == "\nInterrupted before the start.\n"


def test_help_shows_the_docstring_and_our_flags_only():
  result = _run("pass", "--help")
  assert (result.returncode, result.stderr) == (0, "")
  assert result.stdout.startswith(
    "Counts.\n\n  count --number=1 \\\n    --more\n"
  )
  assert "  --number=VALUE\n      Any. Default: 1.\n" in result.stdout
  assert "logtostderr" not in result.stdout
  assert "logtostderr" in _run("pass", "--helpfull").stdout


def test_success_exits_with_zero():
  result = _run("pass", "--number=2")
  assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("more", "Unexpected arguments ['more']"),
    ("--number=x", "invalid literal"),
    ("--numbr=2", "Did you mean: number"),
  ],
)
def test_invalid_flags_exit_with_code_2(argument, message):
  result = _run("pass", argument)
  assert result.returncode == 2
  assert message in result.stderr
  assert "  fix  : " in result.stderr
  assert "Traceback" not in result.stderr
