# SPDX-License-Identifier: Apache-2.0
"""Means depend on counted tokens only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.losses import reduce

_X_BT = jnp.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0], [7.0, 7.0, 7.0]])
_MASK_BT = jnp.array([[1, 1, 0], [0, 0, 1], [0, 0, 0]], bool)
_MEANS = [reduce.token_mean, reduce.sequence_mean]


def test_token_mean_weighs_tokens_equally():
  assert reduce.token_mean(_X_BT, _MASK_BT) == (1 + 2 + 30) / 3


def test_sequence_mean_weighs_sequences_equally_and_skips_empty_ones():
  assert reduce.sequence_mean(_X_BT, _MASK_BT) == (1.5 + 30) / 2


@pytest.mark.parametrize("mean", _MEANS)
@pytest.mark.parametrize("garbage", [jnp.nan, jnp.inf, 1e30])
def test_masked_values_reach_neither_mean_nor_gradient(mean, garbage):
  dirty_BT = jnp.where(_MASK_BT, _X_BT, garbage)
  clean, grad_BT = jax.value_and_grad(mean)(_X_BT, _MASK_BT)
  dirty, dirty_grad_BT = jax.value_and_grad(mean)(dirty_BT, _MASK_BT)
  assert dirty == clean
  np.testing.assert_array_equal(dirty_grad_BT, grad_BT)


@pytest.mark.parametrize("mean", _MEANS)
def test_mean_and_gradient_are_zero_without_counted_tokens(mean):
  value, grad_BT = jax.value_and_grad(mean)(
    jnp.full((2, 3), jnp.nan), jnp.zeros((2, 3), bool)
  )
  assert value == 0.0
  np.testing.assert_array_equal(grad_BT, 0.0)


@pytest.mark.parametrize("mean", _MEANS)
def test_bfloat16_is_summed_in_float32(mean):
  x_BT = jnp.ones((1, 4096), jnp.bfloat16)
  assert mean(x_BT, x_BT > 0.0).dtype == jnp.float32
  assert mean(x_BT, x_BT > 0.0) == 1.0


def test_mean_is_selected_by_name():
  whole = reduce.mean
  for aggregate in ("token_mean", "sequence_mean"):
    want = getattr(reduce, aggregate)(_X_BT, _MASK_BT)
    assert whole(_X_BT, _MASK_BT, aggregate=aggregate, length=3) == want
  want = reduce.constant_length(_X_BT, _MASK_BT, length=3)
  got = whole(_X_BT, _MASK_BT, aggregate="constant_length", length=3)
  assert got == want
  with pytest.raises(ValueError, match=r"sequence_mean.*batch_mean"):
    whole(_X_BT, _MASK_BT, aggregate="batch_mean", length=3)


def test_constant_length_weighs_tokens_equally():
  grad_BT = jax.grad(reduce.constant_length)(_X_BT, _MASK_BT, length=50)
  num_sequences = np.any(_MASK_BT, axis=1).sum()
  want_BT = np.where(_MASK_BT, 1 / (50 * num_sequences), 0.0)
  np.testing.assert_allclose(grad_BT, want_BT, rtol=1e-6)


@pytest.mark.parametrize("aggregate", reduce.AGGREGATES)
def test_means_of_parts_weighted_by_counts_add_up(aggregate):
  rng = np.random.default_rng(0)
  x_BT = jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)
  mask_BT = jnp.arange(5) < jnp.array([[5], [0], [1], [0], [0], [3]])

  def parts(num_parts):
    means, counts = [], []
    for i in range(num_parts):
      x, mask = x_BT[i::num_parts], mask_BT[i::num_parts]
      means.append(reduce.mean(x, mask, aggregate=aggregate, length=5))
      counts.append(reduce.count(mask, aggregate=aggregate))
    return np.average(means, weights=counts)

  for num_parts in (2, 3, 6):
    np.testing.assert_allclose(parts(num_parts), parts(1), rtol=1e-6)
