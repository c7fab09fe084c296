# SPDX-License-Identifier: Apache-2.0
"""Agreement metrics against NumPy, with padding, and the bound."""

import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax import errors
from atlas_jax.losses import reduce
from atlas_jax.train.guards import agreement


def _batch(gap=0.1):
  generator = np.random.default_rng(0)
  old_BT = generator.normal(-2.0, 1.0, (3, 5)).astype(np.float32)
  rollout_BT = old_BT + generator.uniform(-gap, gap, (3, 5)).astype(np.float32)
  return old_BT, rollout_BT, generator.random((3, 5)) < 0.6


def _measure(*arrays):
  """Returns the measured metrics as numbers."""
  return {
    name: value.mean if isinstance(value, reduce.Mean) else value
    for name, value in agreement.measure(*arrays).items()
  }


def test_metrics_are_means_over_the_masked_in_tokens():
  old_BT, rollout_BT, loss_mask_BT = _batch()
  gap = (old_BT - rollout_BT)[loss_mask_BT]
  measured = _measure(old_BT, rollout_BT, loss_mask_BT)
  expected = {
    "rollout/logprob_gap": np.abs(gap).mean(),
    "rollout/logprob_gap_max": np.abs(gap).max(),
    "rollout/prob_error": np.exp(np.abs(gap)).mean(),
    "rollout/outlier_fraction": 0.0,
    "rollout/kl": (np.exp(gap) - 1 - gap).mean(),
  }
  assert (*measured,) == (*expected,) == agreement.METRICS
  for name, value in expected.items():
    np.testing.assert_allclose(measured[name], value, rtol=1e-4)


@pytest.mark.parametrize("garbage", [jnp.nan, jnp.inf, 1e9])
def test_padding_is_ignored(garbage):
  old_BT, rollout_BT, loss_mask_BT = _batch()
  clean = _measure(old_BT, rollout_BT, loss_mask_BT)
  dirty_BT = jnp.where(loss_mask_BT, old_BT, garbage)
  dirty = _measure(dirty_BT, rollout_BT, loss_mask_BT)
  for name, value in clean.items():
    np.testing.assert_array_equal(dirty[name], value)


def test_equal_logprobs_have_a_prob_error_of_one_and_zero_kl():
  old_BT, _, loss_mask_BT = _batch()
  measured = _measure(old_BT, old_BT, loss_mask_BT)
  assert float(measured["rollout/prob_error"]) == 1.0
  assert float(measured["rollout/kl"]) == 0.0


def test_both_directions_of_a_gap_count():
  """The mean of the signed gap is 0 here."""
  rollout_BT = np.array([[-1.0, -1.0]], np.float32)
  old_BT = rollout_BT + np.array([[0.5, -0.5]], np.float32)
  mask_BT = np.ones((1, 2), bool)
  measured = _measure(old_BT, rollout_BT, mask_BT)
  np.testing.assert_allclose(
    measured["rollout/prob_error"], np.exp(0.5), rtol=1e-6
  )


def _prob_error(gaps):
  gaps_BT = np.asarray(gaps, np.float32)[None]
  zeros_BT, mask_BT = np.zeros_like(gaps_BT), np.ones(gaps_BT.shape, bool)
  measured = _measure(gaps_BT, zeros_BT, mask_BT)
  return float(measured["rollout/prob_error"]), measured


@pytest.mark.parametrize("gap", [7.0, -7.0, 100.0, np.inf])
def test_one_outlier_does_not_stop_a_run_and_is_counted(gap):
  gaps = np.full(51_200, 0.005)
  gaps[17] = gap
  prob_error, measured = _prob_error(gaps)
  agreement.check(prob_error, step=3, max_prob_error=1.02)
  np.testing.assert_allclose(
    measured["rollout/outlier_fraction"], 1 / 51_200, rtol=1e-6
  )
  assert measured["rollout/logprob_gap_max"] == abs(gap)


@pytest.mark.parametrize(
  "gaps",
  [
    np.full(1000, 0.03),  # Every token is a little off.
    np.where(np.arange(1000) % 40 == 0, -5.0, 0.0),  # 2.5 % are far off.
    np.where(np.arange(1000) == 0, np.nan, 0.0),
  ],
)
def test_a_gap_of_many_tokens_stops_a_run(gaps):
  with pytest.raises(errors.DivergedError, match="disagree"):
    agreement.check(_prob_error(gaps)[0], step=3, max_prob_error=1.02)


def test_training_continues_at_the_bound():
  agreement.check(1.02, step=3, max_prob_error=1.02)


@pytest.mark.parametrize("prob_error", [1.021, float("nan"), float("inf")])
def test_above_the_bound_training_stops_with_advice(prob_error):
  with pytest.raises(errors.DivergedError, match="disagree") as caught:
    agreement.check(prob_error, step=3, max_prob_error=1.02)
  assert caught.value.exit_code == errors.Exit.DIVERGED == 4
  assert "step 3" in caught.value.where
  assert "max_prob_error=1.02" in caught.value.where
  assert "docs/agreement.md" in caught.value.fix
