# SPDX-License-Identifier: Apache-2.0
"""Shapes of the schedules, and invalid settings."""

import numpy as np
import pytest

from atlas_jax import errors
from atlas_jax.train import schedule


def _rates(**changes):
  settings = {
    "learning_rate": 2.0,
    "schedule": "cosine",
    "warmup_fraction": 0.2,
    "warmup_steps": 0,
    "decay_fraction": 0.0,
    "num_steps": 20,
    **changes,
  }
  rate = schedule.make(**settings)
  return np.array([rate(i) for i in range(settings["num_steps"] + 1)])


def test_cosine_rises_to_the_peak_and_falls_to_zero():
  rates = _rates()
  np.testing.assert_allclose(rates[:5], [0.5, 1.0, 1.5, 2.0, 2.0])
  falling = np.arange(17) / 16
  cosine = 1.0 + np.cos(np.pi * falling)
  np.testing.assert_allclose(rates[4:], cosine, atol=1e-6)


def test_linear_decays_linearly():
  rates = _rates(schedule="linear")
  np.testing.assert_allclose(rates[4:], 2.0 - np.arange(17) / 8, atol=1e-6)


def test_constant_stays_at_the_peak():
  rates = _rates(schedule="constant")
  np.testing.assert_allclose(rates[3:], 2.0)


def test_wsd_is_constant_before_its_decay():
  rates = _rates(schedule="wsd", decay_fraction=0.25)
  np.testing.assert_allclose(rates[3:16], 2.0)
  np.testing.assert_allclose(rates[15:], 2.0 - 0.4 * np.arange(6), atol=1e-6)


def test_warmup_steps_match_the_same_warmup_fraction():
  rates = _rates(warmup_fraction=0.0, warmup_steps=4)
  np.testing.assert_array_equal(rates, _rates())


@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd"])
def test_no_update_has_a_rate_of_zero(name, num_steps):
  decay_fraction = 0.1 if name == "wsd" else 0.0
  for warmup_fraction in (0.0, 0.05, 0.5, 0.9):
    rates = _rates(
      schedule=name,
      num_steps=num_steps,
      warmup_fraction=warmup_fraction,
      decay_fraction=decay_fraction,
    )
    assert (rates[:num_steps] > 0).all()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"schedule": "cosin"}, "constant, linear, cosine, wsd"),
    ({"warmup_steps": 3}, "At most one of"),
    ({"decay_fraction": 0.1}, "above 0 for schedule wsd"),
    ({"schedule": "wsd"}, "above 0 for schedule wsd"),
    ({"schedule": "wsd", "decay_fraction": 0.9}, "at most 1"),
    ({"warmup_fraction": 1.1}, "at most 1"),
    ({"warmup_fraction": -0.1}, "not be negative"),
    ({"warmup_fraction": 0.0, "warmup_steps": -1}, "not be negative"),
  ],
)
def test_invalid_settings_are_rejected(changes, message):
  with pytest.raises(errors.ConfigError, match=message):
    _rates(**changes)
