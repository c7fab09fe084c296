# SPDX-License-Identifier: Apache-2.0
"""No second is lost, and none is counted twice."""

import pytest

from atlas_jax.train.telemetry import clock


class _Now:
  """A clock that a test moves on."""

  def __init__(self):
    self.seconds = 100.0

  def __call__(self):
    """Tells the time."""
    return self.seconds


def test_phases_and_what_is_between_them_add_up_to_the_time_passed():
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


def test_what_is_taken_is_not_given_again():
  now = _Now()
  watch = clock.Clock(now)
  with watch.phase("eval"):
    now.seconds += 1.0
    assert watch.take() == {"idle": 0.0, "eval": 1.0}
    now.seconds += 2.0
  assert watch.take() == {"eval": 2.0, "idle": 0.0}


def test_a_phase_that_fails_is_over():
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


def test_seconds_may_be_moved_to_another_phase():
  now = _Now()
  watch = clock.Clock(now)
  with watch.phase("train"):
    now.seconds += 5.0
    watch.move(2.0, "compile")
    now.seconds += 1.0
  assert watch.take() == {"idle": 0.0, "train": 4.0, "compile": 2.0}
