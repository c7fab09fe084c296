# SPDX-License-Identifier: Apache-2.0
"""A target is complete or absent, whenever its writer is killed."""

import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from conversion import shards, target

_HOST = socket.gethostname()
_NOBODY = 2**22 + 1  # Larger than any PID.
# Overwrites the target in a loop and prints a line after each version.
_WRITER = """
import pathlib, sys
import numpy as np
from conversion import shards, target
out = pathlib.Path(sys.argv[1])
number = 0
while True:
  number += 1
  with target.writing(out) as partial:
    shards.write(
      partial,
      {"a": (300, 1000), "b": (300, 1000)},
      lambda name: np.full((300, 1000), number, np.float32),
      dtype="float32",
      max_shard_bytes=10**6,
    )
  print("wrote", flush=True)
"""


def _kill_a_writer(out, delay_s):
  process = subprocess.Popen(
    [sys.executable, "-c", _WRITER, str(out)], stdout=subprocess.PIPE
  )
  assert process.stdout is not None
  process.stdout.readline()
  time.sleep(delay_s)
  process.send_signal(signal.SIGKILL)
  process.communicate(timeout=60)
  assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("delay_s", [0.0, 0.004, 0.011, 0.023])
def test_target_is_complete_when_killed_at_any_moment(tmp_path, delay_s):
  out = tmp_path / "out"
  _kill_a_writer(out, delay_s)
  target.clean(out)
  assert os.listdir(tmp_path) == ["out"]
  values = {
    value
    for tensor in shards.open_directory(out).values()
    for value in np.unique(shards.read(tensor))
  }
  assert len(values) == 1  # All tensors are of one version.


def test_leftovers_of_a_dead_process_are_removed(tmp_path):
  (tmp_path / "out").mkdir()
  (tmp_path / f"out.tmp-{_HOST}-{_NOBODY}" / "sub").mkdir(parents=True)
  (tmp_path / f"out.old-{_HOST}-{_NOBODY}").mkdir()
  target.clean(tmp_path / "out")
  assert os.listdir(tmp_path) == ["out"]


def test_target_being_replaced_gets_its_name_back(tmp_path):
  old = tmp_path / f"out.old-{_HOST}-{_NOBODY}"
  old.mkdir()
  (old / "model").write_text("mine")
  target.clean(tmp_path / "out")
  assert (tmp_path / "out" / "model").read_text() == "mine"


@pytest.mark.parametrize(
  "name",
  [
    f"out.tmp-{_HOST}-{os.getppid()}",  # Still running.
    f"out.tmp-elsewhere-{_NOBODY}",
    f"other.tmp-{_HOST}-{_NOBODY}",
    f"out.tmp-{_HOST}",
    "out.old",
  ],
)
def test_files_of_other_processes_are_kept(tmp_path, name):
  (tmp_path / name).mkdir()
  target.clean(tmp_path / "out")
  assert os.listdir(tmp_path) == [name]
