# SPDX-License-Identifier: Apache-2.0
"""All time is attributed to phases, once."""

import pytest

from atlas_jax.train.telemetry import clock


class _Now:
  """A clock that tests advance."""

  def __init__(self):
    self.seconds = 100.0

  def __call__(self):
    """Returns the time."""
    return self.seconds


def test_phases_and_idle_time_add_up_to_the_elapsed_time():
  now = _Now()
  watch = clock.Clock(now)
  now.seconds += 0.25
  with watch.phase("probe"):
    now.seconds += 1.0
  with watch.phase("train"):
    now.seconds += 2.0
    with watch.phase("save"):  # Not a part of the outer phase.
      now.seconds += 4.0
    now.seconds += 8.0
  with watch.phase("probe"):
    now.seconds += 16.0
  taken = watch.take()
  assert taken == {"idle": 0.25, "probe": 17.0, "train": 10.0, "save": 4.0}
  assert sum(taken.values()) == now.seconds - 100.0


def test_take_returns_time_once():
  now = _Now()
  watch = clock.Clock(now)
  with watch.phase("eval"):
    now.seconds += 1.0
    assert watch.take() == {"idle": 0.0, "eval": 1.0}
    now.seconds += 2.0
  assert watch.take() == {"eval": 2.0, "idle": 0.0}


def test_an_exception_leaves_the_phase():
  now = _Now()
  watch = clock.Clock(now)

  def fail():
    with watch.phase("train"):
      now.seconds += 1.0
      raise KeyError

  with pytest.raises(KeyError):
    fail()
  now.seconds += 2.0
  assert watch.take() == {"idle": 2.0, "train": 1.0}


def test_move_attributes_seconds_to_another_phase():
  now = _Now()
  watch = clock.Clock(now)
  with watch.phase("train"):
    now.seconds += 5.0
    watch.move(2.0, "compile")
    now.seconds += 1.0
  assert watch.take() == {"idle": 0.0, "train": 4.0, "compile": 2.0}
