# SPDX-License-Identifier: Apache-2.0
"""Metrics out of bounds are logged with their value, and can stop a run."""

import dataclasses

from absl import logging
import jax.numpy as jnp
import pytest

from atlas_jax import errors, types
from atlas_jax.train.guards import alarm

_NORMAL = {
  "groups/used_fraction": 0.1,
  "groups/truncated_fraction": 0.0,
  "num_tokens": 100,
  "ratio_max": jnp.float32(1.5),
  "kl": jnp.float32(0.1),
}


_ANSWER = types.Attempt("4", 1, "length", correct=False, answer="4")
_RECORD = types.TeachingRecord(
  question=types.Question("q0", "2 + 3?", "5"),
  probe="",
  teacher_rollout=types.Rollout(
    types.Prompt("q0/teach", "Teach.", (1,)),
    types.Completion((1,), (), (), "stop", 0),
  ),
  teaching=None,
  num_teaching_tokens=0,
  baseline=(_ANSWER,),
  taught=(_ANSWER,),
  completion_text="Hello.",
)


def _check(alarm_, metrics, step):
  rewarded = [types.Reward(0.0)] * 2
  alarm_.check(metrics, [_RECORD] * 2, rewarded, step=step)


def _alarm(**changes):
  settings = {
    "max_ratio": 100.0,
    "max_kl": 10.0,
    "stop": False,
    "min_used_fraction": 0.1,
  }
  return alarm.Alarm(**settings | changes)


@pytest.fixture
def warnings(monkeypatch):
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
    ({"kl_old": 23.5}, "kl_old is 23.5, above --config.alarm.max_kl=10."),
  ],
)
def test_a_metric_above_its_bound_is_logged_and_can_stop_a_run(
  warnings, metrics, line
):
  _check(_alarm(), {**_NORMAL, **metrics}, 7)
  assert len(warnings) == 1
  assert warnings[0].startswith(f"ALARM at step 7: {line}")
  with pytest.raises(errors.DivergedError, match="moved too far") as caught:
    _check(_alarm(stop=True), {**_NORMAL, **metrics}, 7)
  assert caught.value.exit_code == 4
  assert caught.value.where.startswith("step 7; --config.alarm.max_")
  key = "max_ratio" if "ratio_max" in metrics else "max_kl"
  _check(_alarm(**{key: 0.0}), {**_NORMAL, **metrics}, 7)
  assert len(warnings) == 2  # From the two calls above.


def test_metrics_within_bounds_and_nan_are_not_logged(warnings):
  """`nonfinite` handles NaN."""
  for metrics in ({}, {"ratio_max": 100.0}, {"kl": jnp.nan}):
    _check(_alarm(stop=True), {**_NORMAL, **metrics}, 1)
  assert warnings == []


def test_a_low_used_fraction_is_logged_and_never_stops_a_run(warnings):
  """Even if no group is used, and the step makes no update."""
  unused = {**_NORMAL, "groups/used_fraction": 0.0}
  _check(_alarm(stop=True), unused, 3)
  assert len(warnings) == 1
  assert warnings[0].startswith(
    "ALARM at step 3: groups/used_fraction is 0, below"
  )
  assert "In 100 % of the groups all rewards are equal" in warnings[0]
  _check(_alarm(min_used_fraction=0.0), unused, 4)
  assert len(warnings) == 1


def test_a_step_without_a_token_is_logged_with_its_reason(warnings):
  metrics = {
    **_NORMAL,
    "groups/used_fraction": 0.0,
    "groups/truncated_fraction": 0.75,
    "num_tokens": 0,
  }
  _check(_alarm(min_used_fraction=0.0), metrics, 4)
  assert "the step trained on no token" in warnings[0]
  assert "in 75% every completion was truncated" in warnings[0]


def test_an_alarm_names_causes_and_shows_one_sample_of_each(warnings):
  watched, unused = _alarm(), {**_NORMAL, "groups/used_fraction": 0.0}
  for step in (1, 2):
    _check(watched, unused, step)
  cause = "\n  cause: 2 of 2 completions lack <teaching>: run SFT first"
  assert all(cause in line for line in warnings)
  assert ["Hello." in line for line in warnings] == [True, False]
  other = dataclasses.replace(_RECORD, teaching="Add.", leaked=True)
  watched.check(unused, [other], [types.Reward(-1.0)], step=3)
  assert "1 of 1 teachings reveal the answer" in warnings[2]
  assert "Hello." in warnings[2]


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
def test_invalid_bounds_are_rejected(changes):
  with pytest.raises(errors.ConfigError, match="Invalid alarm"):
    _alarm(**changes)
