# SPDX-License-Identifier: Apache-2.0
"""Tests rewards shared by the first process."""

import dataclasses
import json

import pytest

from atlas_jax import types
from atlas_jax.rewards import shared

_REWARDS = [
  types.Reward(0.1 + 0.2, parts={"exact": 1.0}),
  types.Reward(None, "late"),
]


def _record(text="4", seconds=1.0):
  completion = types.Completion((1, 2), (-0.5, -0.25), (), "stop", 3)
  return types.TeachingRecord(
    question=types.Question("a", "2 + 2?", "4"),
    probe="add",
    teacher_rollout=types.Rollout(types.Prompt("a", "x", (7,)), completion),
    teaching=None,
    num_teaching_tokens=0,
    baseline=(),
    taught=(types.Attempt(text, 1, "stop", True),),
    seconds=seconds,
  )


class _Wire:
  """Broadcasts JSON from the first process to the others."""

  def first(self, make):
    self.said = json.dumps(make())
    return json.loads(self.said)

  def other(self, make):
    del make  # Called only in the first process.
    return json.loads(self.said)


@pytest.fixture
def wire():
  wire = _Wire()
  first = shared.shared(lambda _: list(_REWARDS), wire.first)
  assert first([_record(), _record("5")]) == _REWARDS
  return wire


def test_other_processes_get_the_exact_rewards_of_the_first(wire):
  records = [_record(seconds=2.0), _record("5", seconds=3.0)]
  assert shared.shared(None, wire.other)(records) == _REWARDS


def test_results_of_other_processes_are_ignored(wire):
  asked = []

  def reward_fn(records):
    asked.append(len(records))
    return [types.Reward(9.0)] * len(records)

  other = shared.shared(reward_fn, wire.other)
  assert other([_record(), _record("5")]) == _REWARDS
  assert asked == [2]


def test_records_that_differ_from_the_first_process_are_rejected(wire):
  drawn = _record("6")
  moved = dataclasses.replace(_record("5"), probe="subtract")
  for records in ([_record(), drawn], [_record(), moved], [_record()]):
    with pytest.raises(RuntimeError, match="other records than the first"):
      shared.shared(None, wire.other)(records)
