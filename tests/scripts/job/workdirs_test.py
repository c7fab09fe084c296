# SPDX-License-Identifier: Apache-2.0
"""Tests the lock of a workdir, and the log of config changes."""

import os
import signal
import subprocess
import sys

from absl import logging
import ml_collections
import pytest

from atlas_jax import errors
from scripts.job import workdirs

_HOLDS = """
import pathlib, sys, time
from scripts.job import workdirs

with workdirs.lock(pathlib.Path(sys.argv[1])):
  print("held", flush=True)
  time.sleep(60)
"""


def test_a_lock_is_released_when_its_process_is_killed(tmp_path):
  with subprocess.Popen(
    [sys.executable, "-c", _HOLDS, str(tmp_path)],
    stdout=subprocess.PIPE,
    text=True,
  ) as child:
    assert child.stdout.readline() == "held\n"
    with (
      pytest.raises(errors.ConfigError, match="Another run") as caught,
      workdirs.lock(tmp_path),
    ):
      pass
    assert f"process {child.pid} on {os.uname().nodename}" in caught.value.why
    assert caught.value.exit_code == 2
    child.send_signal(signal.SIGKILL)
    child.wait(timeout=10)
  with workdirs.lock(tmp_path):
    pass


def test_config_changes_are_logged(tmp_path, monkeypatch):
  warnings = []
  monkeypatch.setattr(logging, "warning", lambda *args: warnings.append(args))
  config = ml_collections.ConfigDict({"a": {"rate": 0.1, "keep": 1}, "b": ()})
  for rate in (0.1, 0.1, 0.2):
    config.a.rate = rate
    workdirs.write_config(tmp_path, config)
  ((message, *values),) = warnings
  assert "a.rate: 0.1 -> 0.2" in message % tuple(values)
  assert "a.keep" not in message % tuple(values)
