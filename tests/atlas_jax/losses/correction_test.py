# SPDX-License-Identifier: Apache-2.0
"""Importance weights that correct for the sampler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax import errors
from atlas_jax.losses import correction

_TIS = dict(level="token", outside="truncate", min_ratio=0.0, max_ratio=3.0)


def _arrays():
  """Ratios 2, 1/2 and 9, then padding; and a sequence of 1 and 4."""
  old_BT = jnp.log(
    jnp.array([[0.5, 0.4, 0.9, jnp.nan], [0.5, 0.4, jnp.nan, jnp.nan]])
  )
  rollout_BT = jnp.log(jnp.array([[0.25, 0.8, 0.1, 0.0], [0.5, 0.1, 0.0, 0.0]]))
  return old_BT, rollout_BT, ~jnp.isnan(old_BT)


@pytest.mark.parametrize(
  ("how", "want_BT"),
  [
    ({}, [[2.0, 0.5, 3.0, 1.0], [1.0, 3.0, 1.0, 1.0]]),
    ({"outside": "mask"}, [[2.0, 0.5, 0.0, 1.0], [1.0, 0.0, 1.0, 1.0]]),
    ({"min_ratio": 0.75}, [[2.0, 0.75, 3.0, 1.0], [1.0, 3.0, 1.0, 1.0]]),
    (
      {"outside": "mask", "min_ratio": 0.75},
      [[2.0, 0.0, 0.0, 1.0], [1.0, 0.0, 1.0, 1.0]],
    ),
    ({"level": "sequence", "max_ratio": 5.0}, [[5.0] * 4, [4.0] * 4]),
    (
      {"level": "sequence", "max_ratio": 5.0, "outside": "mask"},
      [[0.0] * 4, [4.0] * 4],
    ),
    ({"min_ratio": 1.0, "max_ratio": 1.0}, [[1.0] * 4] * 2),
  ],
)
def test_weights_are_the_bounded_ratios(how, want_BT):
  old_BT, rollout_BT, mask_BT = _arrays()

  def total(old_BT):
    weights_BT = correction.sampler_weights(
      old_BT, rollout_BT, mask_BT, **{**_TIS, **how}
    )
    return jnp.sum(weights_BT), weights_BT

  grad_BT, weights_BT = jax.grad(total, has_aux=True)(old_BT)
  np.testing.assert_allclose(weights_BT, want_BT, rtol=1e-6)
  np.testing.assert_array_equal(grad_BT, 0.0)


@pytest.mark.parametrize(
  "wrong",
  [
    {"level": "group"},
    {"outside": "drop"},
    {"min_ratio": -1.0},
    {"min_ratio": 4.0},
  ],
)
def test_invalid_correction_is_rejected(wrong):
  with pytest.raises(errors.ConfigError, match=r"config\.correction"):
    correction.sampler_weights(*_arrays(), **{**_TIS, **wrong})
