# SPDX-License-Identifier: Apache-2.0
"""Attention against NumPy, and the mask."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.models import attention
from tests import tiny


def test_mask_shows_the_past_of_the_own_segment():
  positions = jnp.array([[0, 1, 0, 1, 0]])
  segments = jnp.array([[1, 1, 2, 2, 0]])
  got = attention.causal_mask(
    positions, segments, positions, segments, window=None
  )
  expected = [
    [1, 0, 0, 0, 0],
    [1, 1, 0, 0, 0],
    [0, 0, 1, 0, 0],
    [0, 0, 1, 1, 0],
    [0, 0, 0, 0, 0],  # Padding sees nothing, itself included.
  ]
  np.testing.assert_array_equal(got[0], np.array(expected, bool))


def test_a_window_counts_the_own_token():
  positions, segments = jnp.arange(6)[None], jnp.ones((1, 6), jnp.int32)
  got = attention.causal_mask(
    positions, segments, positions, segments, window=3
  )
  np.testing.assert_array_equal(got[0].sum(axis=1), [1, 2, 3, 3, 3, 3])
  assert got[0, 5, 3:].all()


@pytest.mark.parametrize("cap", [None, 0.5])
def test_attention_is_the_formula_in_numpy(cap):
  config = tiny.build(
    "gemma2",
    num_attention_heads=4,
    num_key_value_heads=2,
    hidden_size=24,
    attn_logit_softcapping=cap,
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
    scores = scores / np.sqrt(6)  # query_pre_attn_scalar.
    scores = cap * np.tanh(scores / cap) if cap else scores
    scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed[:, head] = weights @ np.asarray(v[0, :, head // 2])
  expected = np.einsum("TNH,NHD->TD", mixed, module.o.kernel[...])
  np.testing.assert_allclose(got[0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_softmax_is_in_float32(family):
  config = tiny.build(family).config
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
