# SPDX-License-Identifier: Apache-2.0
"""Attention against NumPy, rotary positions and the mask."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.models import attention
from tests import tiny


def _rotated_dot(q, k, q_position, k_position, frequencies):
  at = attention.rotate
  q = at(q[None, None, None], jnp.array([[q_position]]), frequencies)
  k = at(k[None, None, None], jnp.array([[k_position]]), frequencies)
  return float(jnp.vdot(q, k))


def test_rotation_depends_on_relative_position_only():
  config = tiny.build("llama").config
  frequencies = attention.rope_frequencies(config)
  q, k = jax.random.normal(jax.random.key(0), (2, config.head_width))

  near = _rotated_dot(q, k, 7, 3, frequencies)

  np.testing.assert_allclose(
    _rotated_dot(q, k, 107, 103, frequencies), near, rtol=1e-4
  )
  assert abs(_rotated_dot(q, k, 8, 3, frequencies) - near) > 1e-3


def test_rotation_at_position_zero_is_the_identity():
  x = jax.random.normal(jax.random.key(0), (1, 2, 3, 8))
  frequencies = attention.rope_frequencies(tiny.build("qwen2").config)
  got = attention.rotate(x, jnp.zeros((1, 2), jnp.int32), frequencies)
  np.testing.assert_array_equal(got, x)


def test_rotation_keeps_far_positions_apart_in_bfloat16():
  # bfloat16 holds no odd number above 256, so angles must not be in it.
  x = jnp.ones((1, 2, 1, 8), jnp.bfloat16)
  frequencies = attention.rope_frequencies(tiny.build("qwen2").config)
  got = attention.rotate(x, jnp.array([[4096, 4097]]), frequencies)
  assert got.dtype == jnp.bfloat16
  assert not np.array_equal(got[0, 0], got[0, 1])


def test_mask_shows_the_past_of_the_own_segment():
  positions = jnp.array([[0, 1, 0, 1, 0]])
  segments = jnp.array([[1, 1, 2, 2, 0]])
  got = attention.causal_mask(positions, segments, positions, segments)
  expected = [
    [1, 0, 0, 0, 0],
    [1, 1, 0, 0, 0],
    [0, 0, 1, 0, 0],
    [0, 0, 1, 1, 0],
    [0, 0, 0, 0, 0],  # Padding sees nothing, itself included.
  ]
  np.testing.assert_array_equal(got[0], np.array(expected, bool))


def test_attention_is_the_formula_in_numpy():
  config = tiny.build(
    "qwen2", num_attention_heads=4, num_key_value_heads=2
  ).config
  rngs = nnx.Rngs(params=jax.random.key(0))
  module = attention.Attention(config, dtype=jnp.float32, rngs=rngs)
  keys = jax.random.split(jax.random.key(1), 3)
  q, k, v = (
    jax.random.normal(key, (1, 5, heads, config.head_width))
    for key, heads in zip(keys, (4, 2, 2), strict=True)
  )
  mask = np.tril(np.ones((5, 5), bool))

  got = module.attend(q, k, v, jnp.asarray(mask)[None])

  mixed = np.zeros((5, 4, config.head_width))
  for head in range(4):
    # Two query heads in a row share one key and value head.
    scores = np.asarray(q[0, :, head] @ k[0, :, head // 2].T)
    scores = np.where(mask, scores / np.sqrt(config.head_width), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed[:, head] = weights @ np.asarray(v[0, :, head // 2])
  expected = np.einsum("TNH,NHD->TD", mixed, module.o.kernel[...])
  np.testing.assert_allclose(got[0], expected, rtol=1e-4, atol=1e-6)


def test_softmax_is_in_float32():
  config = tiny.build("qwen2").config
  rngs = nnx.Rngs(params=jax.random.key(0))
  module = attention.Attention(config, dtype=jnp.bfloat16, rngs=rngs)
  shape = jnp.zeros((1, 5, 3, 8), jnp.bfloat16)
  kv = jnp.zeros((1, 5, 1, 8), jnp.bfloat16)
  jaxpr = jax.make_jaxpr(module.attend)(
    shape, kv, kv, jnp.ones((1, 5, 5), bool)
  )
  exps = [line for line in str(jaxpr).splitlines() if " = exp " in line]
  assert exps
  assert all(":f32[" in line for line in exps)
