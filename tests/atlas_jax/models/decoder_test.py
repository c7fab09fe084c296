# SPDX-License-Identifier: Apache-2.0
"""Invariances of the decoder: causality, packing, caching, precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.models import attention, decoder
from tests import tiny


def _loss(model, params, batch, weights_BTV):
  return jnp.sum(weights_BTV * model.logits(params, *batch))


def test_later_tokens_change_no_earlier_logit():
  model = tiny.build("qwen3")
  params = tiny.params_of(model)
  tokens, positions, segments = tiny.batch(model)
  changed = tokens.at[:, 5].set((tokens[:, 5] + 1) % model.config.vocab_size)

  before = model.logits(params, tokens, positions, segments)
  after = model.logits(params, changed, positions, segments)

  np.testing.assert_array_equal(after[:, :5], before[:, :5])
  assert np.all(np.any(np.asarray(after != before)[:, 5:], axis=-1))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_packed_equals_unpacked(family):
  model = tiny.build(family)
  params = tiny.params_of(model)
  lengths = (5, 4)
  tokens, positions, segments = tiny.batch(model, num_tokens=5)
  segments = segments.at[1, 4:].set(0)
  joined = [tokens[row, :n] for row, n in enumerate(lengths)]
  packed = jnp.concatenate([*joined, jnp.zeros(3, jnp.int32)])[None]
  ids = jnp.repeat(jnp.array([1, 2, 0]), jnp.array([5, 4, 3]))[None]
  restarts = jnp.concatenate([jnp.arange(n) for n in (*lengths, 3)])[None]
  key = jax.random.key(3)
  weights = jax.random.normal(key, (2, 5, model.config.vocab_size))
  weights = weights.at[1, 4:].set(0.0)
  flat = jnp.concatenate([weights[0], weights[1, :4], jnp.zeros((3, 37))])

  def value_and_grad(batch, weights):
    return jax.jit(
      jax.value_and_grad(lambda p: _loss(model, p, batch, weights))
    )(params)

  value, grad = value_and_grad((tokens, positions, segments), weights)
  packed_value, packed_grad = value_and_grad(
    (packed, restarts, ids), flat[None]
  )

  np.testing.assert_allclose(packed_value, value, rtol=1e-5, atol=1e-4)
  for got, expected in zip(
    jax.tree.leaves(packed_grad), jax.tree.leaves(grad), strict=True
  ):
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_cached_decoding_matches_the_full_forward_pass(family):
  model = tiny.build(family)
  params = tiny.params_of(model)
  num_prompt, num_new = 6, 4
  # The second prompt is two tokens shorter, padded on the right, so slots and
  # positions differ.
  lengths = jnp.array([6, 4])
  tokens, _, _ = tiny.batch(model, num_tokens=num_prompt + num_new)
  slots = jnp.arange(num_prompt)[None]
  segments = (slots < lengths[:, None]).astype(jnp.int32)
  positions = jnp.broadcast_to(slots, segments.shape)
  cached = functools.partial(jax.jit(model.cached), decoder.unstack(params))

  cache = attention.empty_cache(
    model.config, 2, num_prompt + num_new, jnp.dtype("float32")
  )
  hidden, cache = cached(
    tokens[:, :num_prompt], positions, segments, cache, jnp.int32(0)
  )
  got = [hidden[jnp.arange(2), lengths - 1]]
  for step in range(num_new):
    slot = num_prompt + step
    hidden, cache = cached(
      tokens[:, slot : slot + 1],
      (lengths + step)[:, None],
      jnp.ones((2, 1), jnp.int32),
      cache,
      jnp.int32(slot),
    )
    got.append(hidden[:, 0])

  for row, length in enumerate(lengths.tolist()):
    whole = jnp.concatenate([tokens[row, :length], tokens[row, num_prompt:]])
    expected = model.hidden(
      params,
      whole[None],
      jnp.arange(len(whole))[None],
      jnp.ones((1, len(whole)), jnp.int32),
    )[0, length - 1 :]
    actual = jnp.stack([state[row] for state in got])
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  "changes",
  [{"remat": r} for r in ("dots", "block", "offload")]
  + [{"unroll": 2}, {"unroll": 2, "remat": "block"}],
)
def test_remat_and_unroll_change_no_value_or_gradient(changes):
  plain = tiny.build("qwen2")
  params, batch = tiny.params_of(plain), tiny.batch(plain)
  weights = jax.random.normal(jax.random.key(3), (2, 9, 37))

  def value_and_grad(model):
    return jax.jit(
      jax.value_and_grad(lambda p: _loss(model, p, batch, weights))
    )(params)

  expected = jax.tree.leaves(value_and_grad(plain))
  got = jax.tree.leaves(value_and_grad(tiny.build("qwen2", **changes)))
  for a, b in zip(got, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def _traced_gradient(**changes):
  model = tiny.build("qwen2", num_hidden_layers=6, **changes)
  batch = tiny.batch(model, num_tokens=64)
  gradient = jax.grad(lambda p: jnp.sum(model.hidden(p, *batch)))
  return jax.jit(gradient).trace(model.abstract_params)


def test_rematerialized_activations_are_not_saved():
  none, dots, block, offload = (
    _traced_gradient(remat=remat).lower().compile().memory_analysis()
    for remat in ("none", "dots", "block", "offload")
  )
  assert dots.temp_size_in_bytes < 0.5 * none.temp_size_in_bytes
  assert block.temp_size_in_bytes < 0.8 * dots.temp_size_in_bytes
  # On a CPU, both are the same memory.
  assert offload.temp_size_in_bytes <= block.temp_size_in_bytes


def test_remat_dots_recomputes_no_product_but_scores():
  none, dots = (
    _traced_gradient(remat=remat).lower().compile().as_text().count(" dot(")
    for remat in ("none", "dots")
  )
  assert dots == none + 1


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_remat_offload_moves_block_inputs_to_host_memory(platform):
  for remat, is_there in (("offload", True), ("block", False)):
    traced = _traced_gradient(remat=remat)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("pinned_host" in text) == is_there


def test_unrolled_blocks_are_not_merged_with_their_recomputation():
  for unroll, is_needed in ((3, False), (6, True)):
    traced = _traced_gradient(remat="block", unroll=unroll)
    text = traced.lower().as_text()
    assert ("optimization_barrier" in text) == is_needed


def test_unknown_remat_is_rejected():
  with pytest.raises(ValueError, match="got 'full'"):
    tiny.build("qwen2", remat="full")


def test_bfloat16_keeps_parameters_and_logits_in_float32():
  model = tiny.build("qwen3", dtype="bfloat16")
  params, batch = tiny.params_of(model), tiny.batch(model)

  logits = jax.jit(model.logits)(params, *batch)

  hidden = jax.eval_shape(model.hidden, params, *batch)
  assert hidden.dtype == jnp.bfloat16
  assert logits.dtype == jnp.float32
  # A cast after a bfloat16 product would leave bfloat16 values.
  assert not np.array_equal(logits, logits.astype(jnp.bfloat16))
  exact = jax.jit(tiny.build("qwen3").logits)(params, *batch)
  scale = float(jnp.max(jnp.abs(exact)))
  np.testing.assert_allclose(logits, exact, atol=0.05 * scale, rtol=0)
  grads = jax.eval_shape(
    jax.grad(lambda p: jnp.sum(model.logits(p, *batch))), params
  )
  dtypes = {leaf.dtype for leaf in jax.tree.leaves(grads)}
  assert dtypes == {jnp.dtype("float32")}


def test_padding_changes_no_logit_and_leaks_no_nan():
  model = tiny.build("llama")
  params = tiny.params_of(model)
  tokens, positions, segments = tiny.batch(model, num_tokens=6)
  padding = ((0, 0), (0, 3))
  padded = (
    jnp.pad(tokens, padding, constant_values=5),
    jnp.pad(positions, padding),
    jnp.pad(segments, padding),
  )

  got = model.logits(params, *padded)

  assert np.all(np.isfinite(got))
  np.testing.assert_allclose(
    got[:, :6],
    model.logits(params, tokens, positions, segments),
    rtol=1e-5,
    atol=1e-5,
  )


@pytest.mark.parametrize("tied", [False, True])
def test_abstract_params_match_those_of_init(tied):
  model = tiny.build("qwen2", tie_word_embeddings=tied)
  params = jax.eval_shape(model.init, jax.random.key(0))
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params
  )
  assert abstract == jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model.abstract_params
  )
  assert ("head" in params) == (not tied)
  assert jax.eval_shape(model.head, params).shape == (21, 37)


def test_layers_are_initialized_differently():
  model = tiny.build("qwen2")
  kernel = model.init(jax.random.key(0))["layers"]["mlp"]["up"]["kernel"]
  assert not np.array_equal(kernel[0], kernel[1])
