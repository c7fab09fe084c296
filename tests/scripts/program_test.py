# SPDX-License-Identifier: Apache-2.0
"""Tests the exit code and the error message of every way to exit."""

import os
import subprocess
import sys

import pytest

_FOUR = 'errors.{}("What.", where="here", why="so", fix="that")'
_SCRIPT = """
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


def _run(line, *arguments):
  return subprocess.run(
    [sys.executable, "-c", _SCRIPT.format(line), *arguments],
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
