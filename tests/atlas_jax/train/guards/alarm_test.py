# SPDX-License-Identifier: Apache-2.0
"""A policy that runs away is told of: by what, how far; and may be stopped."""

from absl import logging
import jax.numpy as jnp
import pytest

from atlas_jax import errors
from atlas_jax.train.guards import alarm

_CALM = {
  "groups/used_fraction": 0.1,
  "ratio_max": jnp.float32(1.5),
  "kl": jnp.float32(0.1),
}


def _alarm(**changes):
  settings = {
    "max_ratio": 100.0,
    "max_kl": 10.0,
    "stop": False,
    "min_used_fraction": 0.1,
  }
  return alarm.Alarm(**settings | changes)


@pytest.fixture
def told(monkeypatch):
  lines = []
  monkeypatch.setattr(
    logging, "warning", lambda text, *args: lines.append(text % args)
  )
  return lines


@pytest.mark.parametrize(
  ("metrics", "line"),
  [
    ({"ratio_max": 5e21}, "ratio_max is 5e+21, above --config.alarm.max_ratio"),
    (
      {"ratio_max": jnp.inf},
      "ratio_max is inf, above --config.alarm.max_ratio",
    ),
    ({"kl": jnp.float32(23.5)}, "kl is 23.5, above --config.alarm.max_kl=10."),
  ],
)
def test_what_is_out_of_bounds_is_told_and_stops_a_run_if_asked_to(
  told, metrics, line
):
  _alarm().check({**_CALM, **metrics}, step=7)
  assert len(told) == 1
  assert told[0].startswith(f"ALARM at step 7: {line}")
  with pytest.raises(errors.DivergedError, match="moved too far") as caught:
    _alarm(stop=True).check({**_CALM, **metrics}, step=7)
  assert caught.value.exit_code == 4
  assert caught.value.where.startswith("step 7; --config.alarm.max_")
  key = "max_" + next(iter(metrics)).removesuffix("_max")
  _alarm(**{key: 0.0}).check({**_CALM, **metrics}, step=7)
  assert len(told) == 2  # Of the two calls before.


def test_what_is_calm_or_no_number_is_not(told):
  """NaN is what `nonfinite` is for."""
  for metrics in ({}, {"ratio_max": 100.0}, {"kl": jnp.nan}):
    _alarm(stop=True).check({**_CALM, **metrics}, step=1)
  assert told == []


def test_groups_that_teach_nothing_are_told_of_and_never_stop_a_run(told):
  """Even if no group is left, and so nothing was updated."""
  _alarm(stop=True).check({"groups/used_fraction": 0.0}, step=3)
  assert len(told) == 1
  assert told[0].startswith("ALARM at step 3: groups/used_fraction is 0, below")
  _alarm(min_used_fraction=0.0).check({"groups/used_fraction": 0.0}, step=4)
  assert len(told) == 1


@pytest.mark.parametrize(
  "changes",
  [
    {"max_ratio": 1.0},
    {"max_ratio": -2.0},
    {"max_kl": -1.0},
    {"min_used_fraction": 1.5},
    {"stop": True, "max_ratio": 0.0, "max_kl": 0.0},
  ],
)
def test_an_alarm_that_would_always_or_never_ring_is_refused(changes):
  with pytest.raises(errors.ConfigError, match="no such alarm"):
    _alarm(**changes)
