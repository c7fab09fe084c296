# SPDX-License-Identifier: Apache-2.0
"""Layers against NumPy."""

import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.models import layers


@pytest.mark.parametrize("zero_centered", [False, True])
def test_rms_norm_matches_numpy(zero_centered):
  rng = np.random.default_rng(0)
  x, scale = rng.normal(size=(3, 7)), rng.normal(size=7)

  got = layers.rms_norm(
    jnp.asarray(x),
    jnp.asarray(scale),
    epsilon=0.1,
    zero_centered=zero_centered,
    dtype=jnp.float32,
  )

  expected = (
    (scale + zero_centered)
    * x
    / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 0.1)
  )
  np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("zero_centered", [False, True])
def test_rms_norm_rounds_only_once(zero_centered):
  x = jax.random.normal(jax.random.key(0), (50, 64), jnp.bfloat16)
  got = layers.rms_norm(
    x,
    jnp.full((64,), 1.0 - zero_centered),
    epsilon=1e-6,
    zero_centered=zero_centered,
    dtype=jnp.bfloat16,
  )
  exact = np.asarray(x, np.float64)
  exact /= np.sqrt(np.mean(exact**2, axis=-1, keepdims=True) + 1e-6)
  assert got.dtype == jnp.bfloat16
  same = np.asarray(got) == exact.astype(jnp.bfloat16)
  assert np.mean(same) > 0.999  # 0.7 if computed in bfloat16.


@pytest.mark.parametrize(
  ("shape_in", "shape_out"), [((6,), (3, 4)), ((3, 4), (6,)), ((6,), (5,))]
)
def test_linear_contracts_trailing_axes(shape_in, shape_out):
  linear = layers.Linear(
    shape_in,
    shape_out,
    use_bias=True,
    scale=0.5,
    dtype=jnp.float32,
    rngs=nnx.Rngs(params=jax.random.key(0)),
  )
  linear.bias = nnx.Param(jax.random.normal(jax.random.key(1), shape_out))
  x = jax.random.normal(jax.random.key(2), (2, 5, *shape_in))

  expected = np.tensordot(x, linear.kernel[...], axes=len(shape_in))
  np.testing.assert_allclose(
    linear(x), expected + np.asarray(linear.bias[...]), rtol=1e-5, atol=1e-6
  )


def test_linear_is_initialized_with_its_scale():
  linear = layers.Linear(
    (200,),
    (100,),
    use_bias=False,
    scale=0.02,
    dtype=jnp.float32,
    rngs=nnx.Rngs(params=jax.random.key(0)),
  )
  assert float(jnp.std(linear.kernel[...])) == pytest.approx(0.02, rel=0.02)
  assert linear.bias is None


def test_gated_mlp_matches_numpy():
  mlp = layers.GatedMLP(
    5,
    7,
    activation="silu",
    scale=1.0,
    dtype=jnp.float32,
    rngs=nnx.Rngs(params=jax.random.key(0)),
  )
  x = jax.random.normal(jax.random.key(1), (2, 3, 5))
  gate, up, down = (
    np.asarray(layer.kernel[...]) for layer in (mlp.gate, mlp.up, mlp.down)
  )
  gated = np.asarray(x) @ gate
  gated = gated / (1.0 + np.vectorize(math.exp)(-gated))
  expected = (gated * (np.asarray(x) @ up)) @ down
  np.testing.assert_allclose(mlp(x), expected, rtol=1e-4, atol=1e-5)
