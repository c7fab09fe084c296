# SPDX-License-Identifier: Apache-2.0
"""A run that never updated the parameters says so, and can fail."""

import logging

import ml_collections
import pytest

from atlas_jax import errors
from scripts.job import outcome


def _report(workdir, line, *, require_updates=False):
  (workdir / "metrics.jsonl").write_text(line + "\n")
  config = ml_collections.ConfigDict(
    {"loop": {"require_updates": require_updates}}
  )
  outcome.report(workdir, config)


@pytest.mark.parametrize("require_updates", [False, True])
def test_a_trained_run_ends_with_its_last_metrics(
  tmp_path, caplog, require_updates
):
  caplog.set_level(logging.INFO)
  line = (
    '{"step": 4, "loss": 0.25, "reward": 1.5, "updated_fraction": 0.1, '
    '"learning_rate": 0.5}'
  )
  _report(tmp_path, line, require_updates=require_updates)
  (record,) = caplog.records
  assert record.getMessage() == "Finished: loss=0.25 reward=1.5"


def test_an_untrained_run_warns_or_exits_with_4(tmp_path, caplog):
  line = (
    '{"step": 4, "reward": 0.0, "updated_fraction": 0.0, "learning_rate": 0.5}'
  )
  _report(tmp_path, line)
  (record,) = caplog.records
  assert record.levelno == logging.WARNING
  assert record.getMessage().startswith("NOTHING WAS LEARNT")
  with pytest.raises(
    errors.DivergedError, match="Nothing was learnt"
  ) as caught:
    _report(tmp_path, line, require_updates=True)
  assert caught.value.exit_code == 4
