# SPDX-License-Identifier: Apache-2.0
"""Progress in logs and on terminals; a closed stderr is ignored."""

import logging
import os
import pathlib
import pty
import re
import subprocess
import sys

import pytest

from atlas_jax.train.telemetry import console

_ROOT = pathlib.Path(__file__).parents[4]
_SCRIPT = """
import sys, time
from absl import flags, logging
flags.FLAGS(sys.argv[:1])
logging.use_absl_handler()
logging.set_verbosity(logging.INFO)
from atlas_jax.train.telemetry import console
shown = console.Console(step=0, num_steps=200)
for step in range(1, 201):
  shown.advance(step, once_s=0.0)
  if step % 50 == 0:
    shown.report(step, {"loss": 0.5})
    shown.table("completions", [{"text": "[b]x", "reward": 1.0}])
    time.sleep(0.3)
shown.close()
open(sys.argv[1], "w").write("to the end")
"""


def _messages(caplog):
  return [record.getMessage() for record in caplog.records]


def test_a_log_line_has_metrics_and_the_expected_end(caplog):
  caplog.set_level(logging.INFO)
  now = [0.0]
  shown = console.Console(step=10, num_steps=20, now=lambda: now[0])
  now[0] = 40.0
  crowd = dict.fromkeys(["seconds/train", "eval/teaching/NDR_low"], 1.0)
  rewards = {"rewards/exact": 0.25, "rewards/overlong": 0.0}
  shown.report(12, {"kl": 0.5, "loss": 0.123456, **rewards, **crowd})
  (line,) = _messages(caplog)
  assert re.fullmatch(
    r"step 12/20 loss=0\.1235 rewards/exact=0\.25 kl=0\.5 "
    r"eta=0:02:40 \(\d\d:\d\d\)",
    line,
  )


def test_the_expected_end_leaves_compilation_out(caplog):
  caplog.set_level(logging.INFO)
  now = [0.0]
  shown = console.Console(step=0, num_steps=11, now=lambda: now[0])
  now[0] = 25.0
  shown.advance(1, once_s=20.0)
  shown.report(1, {"loss": 1.0})
  (line,) = _messages(caplog)
  assert "eta=0:00:50 " in line


def test_the_phases_of_the_first_step_are_named_once(caplog):
  caplog.set_level(logging.INFO)
  shown = console.Console(step=4, num_steps=9)
  for name in ("push", "baseline", "train", "train"):
    shown.phase(name)
  shown.advance(5, once_s=0.0)
  shown.phase("baseline")
  assert _messages(caplog) == [
    "Step 5: sampling baselines ...",
    "Step 5: compiling and running the update ...",
  ]


def test_a_log_is_never_silent_for_long(caplog):
  caplog.set_level(logging.INFO)
  now = [0.0]
  shown = console.Console(step=0, num_steps=100, now=lambda: now[0])
  for step in range(1, 11):
    now[0] += 10.0
    shown.advance(step, once_s=0.0)
  assert [line.split()[1] for line in _messages(caplog)] == ["4/100", "8/100"]


@pytest.mark.slow
def test_a_terminal_shows_a_bar_and_a_table(tmp_path):
  ours, theirs = pty.openpty()
  process = _start(tmp_path, theirs)
  os.close(theirs)
  shown = b""
  while chunk := _read(ours):
    shown += chunk
  os.close(ours)
  assert process.wait(timeout=60) == 0
  text = shown.decode()
  assert "step 100/200 loss=0.5" in text
  assert "100/200 \x1b" in text or "━" in text
  assert "[b]x" in text


@pytest.mark.slow
@pytest.mark.parametrize("make", [pty.openpty, os.pipe])
def test_a_closed_stderr_is_ignored(tmp_path, make):
  ours, theirs = make()
  process = _start(tmp_path, theirs)
  os.close(theirs)
  assert os.read(ours, 1)
  os.close(ours)
  assert process.wait(timeout=60) == 0
  assert (tmp_path / "end").read_text() == "to the end"


def _start(tmp_path, stderr):
  return subprocess.Popen(
    [sys.executable, "-c", _SCRIPT, str(tmp_path / "end")],
    cwd=_ROOT,
    env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    stdin=subprocess.DEVNULL,
    stderr=stderr,
    start_new_session=True,
  )


def _read(descriptor):
  try:
    return os.read(descriptor, 4096)
  except OSError:  # Linux raises at the end of a terminal.
    return b""
