# SPDX-License-Identifier: Apache-2.0
"""Tests that the committed checkpoint of an earlier release is restored."""

import json
import shutil

from atlas_jax import checkpoint
from tests.golden import write_checkpoint as golden


def test_the_committed_checkpoint_is_restored_bit_for_bit(tmp_path):
  shutil.copytree(golden.DIRECTORY, tmp_path / "checkpoints")
  checkpointer = checkpoint.Checkpointer(
    tmp_path / "checkpoints", **golden.SETTINGS
  )
  state, host_state = checkpointer.restore_latest(golden.state())
  assert golden.digests(state) == json.loads(golden.DIGESTS.read_text("utf-8"))
  assert host_state == golden.HOST_STATE
  assert checkpointer.best_step() == 1
