# SPDX-License-Identifier: Apache-2.0
"""The schedule's shape, and AdamW against its paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax import errors
from atlas_jax.train import optimizer

_ADAM = {
  "weight_decay": 0.1,
  "beta1": 0.9,
  "beta2": 0.95,
  "epsilon": 1e-8,
  "max_grad_norm": 1.0,
}


def _rates(**changes):
  settings = {
    "learning_rate": 2.0,
    "schedule": "cosine",
    "warmup_fraction": 0.2,
    "num_updates": 20,
    **changes,
  }
  rate = optimizer.make_schedule(**settings)
  return np.array([rate(i) for i in range(settings["num_updates"] + 1)])


def test_cosine_rises_to_the_peak_and_falls_to_zero():
  rates = _rates()
  np.testing.assert_allclose(rates[:5], [0.5, 1.0, 1.5, 2.0, 2.0])
  falling = np.arange(17) / 16
  cosine = 1.0 + np.cos(np.pi * falling)
  np.testing.assert_allclose(rates[4:], cosine, atol=1e-6)


def test_constant_stays_at_the_peak():
  rates = _rates(schedule="constant")
  np.testing.assert_allclose(rates[3:], 2.0)


@pytest.mark.parametrize("num_updates", [1, 2, 3])
def test_no_update_is_lost_on_a_rate_of_zero(num_updates):
  for warmup_fraction in (0.0, 0.05, 0.5, 1.0):
    rates = _rates(num_updates=num_updates, warmup_fraction=warmup_fraction)
    assert (rates[:num_updates] > 0).all()


def test_unknown_schedule_is_refused():
  with pytest.raises(errors.ConfigError, match="cosine"):
    _rates(schedule="linear")


def _params():
  values = {"kernel": [1.0, -2.0], "scale": [3.0, 4.0], "bias": [0.5, 0.5]}
  return {"layers": {name: jnp.array(value) for name, value in values.items()}}


def test_one_update_is_the_papers_with_clipping_and_masked_decay():
  params = _params()
  grads = jax.tree.map(lambda x: 10.0 * x, params)
  adamw = optimizer.make_optimizer(lambda _: 0.01, **_ADAM)
  updates, _ = adamw.update(grads, adamw.init(params), params)
  norm = np.sqrt(sum(np.sum(np.square(g)) for g in grads["layers"].values()))
  for name, grad in grads["layers"].items():
    clipped = np.asarray(grad) / norm
    # After one update both moments are unbiased to the gradient itself.
    step = clipped / (np.abs(clipped) + 1e-8)
    decay = 0.1 if name == "kernel" else 0.0
    expected = -0.01 * (step + decay * np.asarray(params["layers"][name]))
    np.testing.assert_allclose(updates["layers"][name], expected, rtol=1e-5)


def test_small_gradients_are_not_scaled_up():
  settings = {**_ADAM, "epsilon": 1.0, "weight_decay": 0.0}
  params = {"kernel": jnp.zeros(1)}
  adamw = optimizer.make_optimizer(lambda _: 1.0, **settings)
  grads = {"kernel": jnp.array([0.5])}
  updates, _ = adamw.update(grads, adamw.init(params), params)
  np.testing.assert_allclose(updates["kernel"], -0.5 / 1.5, rtol=1e-5)
