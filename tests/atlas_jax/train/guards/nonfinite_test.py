# SPDX-License-Identifier: Apache-2.0
"""Skipped updates are checked one step late, and none is missed."""

import json

import pytest

from atlas_jax import errors
from atlas_jax.train.guards import nonfinite


class _OnDevice:
  """A value that records whether it was read."""

  def __init__(self, value):
    self.value, self.is_read = value, False

  def __int__(self):
    self.is_read = True
    return self.value


def _watch(tmp_path, max_nonfinite=1):
  return nonfinite.Watch(lambda step: [f"row {step}"], tmp_path, max_nonfinite)


def _metrics(count, loss=float("nan"), norm=float("inf")):
  return {"num_nonfinite": count, "loss": loss, "grad_norm": norm}


def test_a_step_is_read_when_the_next_one_is_queued(tmp_path):
  watch = _watch(tmp_path)
  counts = [_OnDevice(0) for _ in range(3)]
  for step, count in enumerate(counts, start=1):
    watch.add(step, _metrics(count))
    assert [c.is_read for c in counts[:step]] == [True] * (step - 1) + [False]
  watch.settle()
  assert counts[-1].is_read


def test_too_many_skipped_updates_raise_and_write_their_rows(tmp_path):
  watch = _watch(tmp_path)
  for step, count in enumerate((1, 0, 1, 2), start=1):
    watch.add(step, _metrics(count))
  with pytest.raises(errors.DivergedError, match="2 updates") as caught:
    watch.settle()
  assert caught.value.exit_code == 4
  assert "nonfinite-4.json" in caught.value.where
  written = json.loads((tmp_path / "nonfinite-4.json").read_text())
  # The finite step 2 resets the list; `row_ids` receives the number of steps
  # done before a step.
  assert written == {
    "skipped": [
      {"step": s, "loss": "nan", "grad_norm": "inf", "rows": [f"row {s - 1}"]}
      for s in (3, 4)
    ]
  }


def test_a_step_without_an_update_is_accepted(tmp_path):
  watch = _watch(tmp_path, max_nonfinite=0)
  watch.add(1, {})
  watch.settle()
  watch.settle()
  assert list(tmp_path.iterdir()) == []
