# SPDX-License-Identifier: Apache-2.0
"""Cross entropy is the mean over counted tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.losses import sft

_LOGPROBS_BT = jnp.array([[-1.0, -2.0, -4.0], [-3.0, -8.0, -9.0]])
_NORMALIZERS_BT = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
_MASK_BT = jnp.array([[1, 1, 0], [1, 0, 0]], bool)


def test_loss_is_the_mean_over_all_counted_tokens():
  loss, metrics = sft.cross_entropy(
    _LOGPROBS_BT, _NORMALIZERS_BT, _MASK_BT, z_loss_coef=0.0
  )
  assert loss == (1 + 2 + 3) / 3
  assert metrics["loss"] == metrics["cross_entropy"] == loss
  assert metrics["num_tokens"] == 3


def test_z_loss_is_the_mean_square_of_the_normalizer():
  loss, metrics = sft.cross_entropy(
    _LOGPROBS_BT, _NORMALIZERS_BT, _MASK_BT, z_loss_coef=0.1
  )
  np.testing.assert_allclose(loss, 2.0 + 0.1 * (1 + 4 + 16) / 3, rtol=1e-6)
  assert metrics["cross_entropy"] == 2.0


@pytest.mark.parametrize("garbage", [0.0, -jnp.inf, jnp.nan])
def test_padding_changes_neither_loss_nor_gradient(garbage):
  def loss(logprobs_BT, normalizers_BT):
    return sft.cross_entropy(
      logprobs_BT, normalizers_BT, _MASK_BT, z_loss_coef=0.1
    )[0]

  grad = jax.value_and_grad(loss, argnums=(0, 1))
  dirty = [
    jnp.where(_MASK_BT, x_BT, garbage)
    for x_BT in (_LOGPROBS_BT, _NORMALIZERS_BT)
  ]
  jax.tree.map(
    np.testing.assert_array_equal,
    grad(*dirty),
    grad(_LOGPROBS_BT, _NORMALIZERS_BT),
  )
