# SPDX-License-Identifier: Apache-2.0
"""Chunked log-probabilities match the plain ones and need little memory."""

import jax
from jax import extend
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.losses import logprobs

_B, _T, _D, _V = 2, 37, 5, 101


def _batch(dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 3)
  hidden_BTD = jax.random.normal(keys[0], (_B, _T, _D), dtype)
  head_DV = jax.random.normal(keys[1], (_D, _V))
  targets_BT = jax.random.randint(keys[2], (_B, _T), 0, _V)
  return hidden_BTD, head_DV, targets_BT


def _whole(hidden_BTD, head_DV, targets_BT, *, temperature):
  logits_BTV = jnp.einsum(
    "BTD,DV->BTV",
    hidden_BTD,
    head_DV.astype(hidden_BTD.dtype),
    preferred_element_type=jnp.float32,
  )
  return logprobs.from_logits(logits_BTV, targets_BT, temperature=temperature)


def _weighted_sum(stats):
  """Sums the statistics with a gradient, with random weights per token."""
  weights = np.random.default_rng(1).normal(size=(3, _B, _T))
  return jnp.sum(jnp.stack(stats[:3]) * weights)


def test_from_logits_is_softmax_at_the_temperature():
  logits_BTV = np.random.default_rng(0).normal(size=(_B, _T, _V))
  targets_BT = np.random.default_rng(1).integers(0, _V, (_B, _T))
  exp_BTV = np.exp(logits_BTV / 0.7)
  probs_BTV = exp_BTV / exp_BTV.sum(-1, keepdims=True)
  picked_BT = np.take_along_axis(probs_BTV, targets_BT[..., None], -1)[..., 0]

  stats = logprobs.from_logits(
    jnp.asarray(logits_BTV), jnp.asarray(targets_BT), temperature=0.7
  )

  np.testing.assert_allclose(stats.logprobs, np.log(picked_BT), atol=1e-5)
  np.testing.assert_allclose(
    stats.entropy, -(probs_BTV * np.log(probs_BTV)).sum(-1), atol=1e-5
  )
  np.testing.assert_allclose(
    stats.log_normalizer, np.log(exp_BTV.sum(-1)), atol=1e-5
  )
  np.testing.assert_array_equal(
    stats.is_likeliest, targets_BT == logits_BTV.argmax(-1)
  )


def test_uniform_logits_have_the_entropy_of_the_vocabulary():
  stats = logprobs.from_logits(
    jnp.full((1, 1, _V), 7.0), jnp.zeros((1, 1), int), temperature=1.0
  )
  np.testing.assert_allclose(stats.entropy, np.log(_V), rtol=1e-6)
  np.testing.assert_allclose(stats.logprobs, -np.log(_V), rtol=1e-6)


def test_huge_bfloat16_logits_stay_finite():
  logits_BTV = jnp.array([[[3e4, -3e4, 0.0]]], jnp.bfloat16)
  stats = logprobs.from_logits(
    logits_BTV, jnp.zeros((1, 1), int), temperature=1.0
  )
  assert all(x.dtype == jnp.float32 for x in stats[:3])
  np.testing.assert_array_equal(stats.logprobs, 0.0)
  np.testing.assert_array_equal(stats.entropy, 0.0)


@pytest.mark.parametrize("chunk_tokens", [1, 8, _T, 512])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_chunks_change_neither_values_nor_gradients(chunk_tokens, temperature):
  hidden_BTD, head_DV, targets_BT = _batch()

  def chunked(hidden_BTD, head_DV):
    stats = logprobs.of_targets(
      hidden_BTD,
      head_DV,
      targets_BT,
      temperature=temperature,
      chunk_tokens=chunk_tokens,
    )
    return _weighted_sum(stats), stats

  def whole(hidden_BTD, head_DV):
    stats = _whole(hidden_BTD, head_DV, targets_BT, temperature=temperature)
    return _weighted_sum(stats), stats

  got, want = (
    jax.jit(jax.grad(f, argnums=(0, 1), has_aux=True))(hidden_BTD, head_DV)
    for f in (chunked, whole)
  )
  for got_leaf, want_leaf in zip(
    jax.tree.leaves(got), jax.tree.leaves(want), strict=True
  ):
    np.testing.assert_allclose(got_leaf, want_leaf, atol=2e-5, rtol=1e-5)


def test_bfloat16_hidden_states_are_summed_in_float32():
  hidden_BTD, head_DV, targets_BT = _batch(jnp.bfloat16)

  def loss(head_DV):
    stats = logprobs.of_targets(
      hidden_BTD, head_DV, targets_BT, temperature=1.0, chunk_tokens=8
    )
    return jnp.sum(stats.logprobs), stats

  grad_DV, stats = jax.grad(loss, has_aux=True)(head_DV)
  want = _whole(hidden_BTD, head_DV, targets_BT, temperature=1.0)
  assert grad_DV.dtype == jnp.float32
  np.testing.assert_allclose(stats.logprobs, want.logprobs, atol=1e-5)


def _sizes(jaxpr):
  """Returns the sizes of all arrays in a jaxpr and its sub-jaxprs."""
  for equation in jaxpr.eqns:
    yield from (variable.aval.size for variable in equation.outvars)
    for inner in jax.tree.leaves(list(equation.params.values())):
      if isinstance(inner, extend.core.ClosedJaxpr | extend.core.Jaxpr):
        yield from _sizes(inner)


def _largest_array(loss, *args):
  return max(_sizes(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(*args)))


def _summed(chunk_tokens):
  """Returns a loss over 64 tokens of a vocabulary of 256, and its arguments."""
  targets_BT = jnp.zeros((_B, 64), int)

  def loss(hidden_BTD, head_DV):
    stats = (
      logprobs.of_targets(
        hidden_BTD,
        head_DV,
        targets_BT,
        temperature=1.0,
        chunk_tokens=chunk_tokens,
      )
      if chunk_tokens
      else _whole(hidden_BTD, head_DV, targets_BT, temperature=1.0)
    )
    return sum(jnp.sum(x) for x in stats)

  return loss, jnp.ones((_B, 64, 4)), jnp.ones((4, 256))


@pytest.mark.parametrize(
  ("chunk_tokens", "num_tokens"), [(None, 64), (8, 8), (40, 32), (512, 64)]
)
def test_no_array_holds_more_logits_than_one_chunk(chunk_tokens, num_tokens):
  assert _largest_array(*_summed(chunk_tokens)) == _B * num_tokens * 256


def _temporary_bytes(chunk_tokens, num_tokens, num_words):
  """Compiles the gradient of every statistic; returns its memory."""

  def loss(hidden_BTD, head_DV):
    targets_BT = jnp.zeros((_B, num_tokens), int)
    stats = logprobs.of_targets(
      hidden_BTD,
      head_DV,
      targets_BT,
      temperature=1.0,
      chunk_tokens=chunk_tokens,
    )
    return sum(jnp.sum(x) for x in stats)

  args = jnp.ones((_B, num_tokens, 4)), jnp.ones((4, num_words))
  step = jax.jit(jax.grad(loss, argnums=(0, 1)))
  return step.lower(*args).compile().memory_analysis().temp_size_in_bytes


def test_compiled_memory_does_not_grow_with_vocabulary_times_sequence():
  short = _temporary_bytes(8, 64, 1024)
  long = _temporary_bytes(8, 512, 1024)
  # The rest is hidden states and statistics, a few numbers per token.
  assert long - short < 128 * _B * (512 - 64)
  assert long < 0.3 * 4 * _B * 512 * 1024
  # With one chunk it does grow, so the bound above is meaningful.
  assert _temporary_bytes(512, 512, 1024) >= 4 * _B * 512 * 1024


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_must_be_positive(temperature):
  with pytest.raises(ValueError, match="temperature"):
    logprobs.of_targets(*_batch(), temperature=temperature, chunk_tokens=8)


def test_chunk_size_must_be_positive():
  with pytest.raises(ValueError, match="chunk_tokens"):
    logprobs.of_targets(*_batch(), temperature=1.0, chunk_tokens=0)


def test_sharded_head_and_batch_match_unsharded():
  hidden_BTD, head_DV, targets_BT = _batch()
  head_DV = head_DV[:, :100]
  targets_BT = targets_BT % 100
  mesh = jax.make_mesh(
    (2, 4), ("data", "tensor"), (jax.sharding.AxisType.Auto,) * 2
  )

  def on(*axes):
    return jax.sharding.NamedSharding(mesh, jax.P(*axes))

  def loss(hidden_BTD, head_DV, targets_BT):
    return _weighted_sum(
      logprobs.of_targets(
        hidden_BTD, head_DV, targets_BT, temperature=1.0, chunk_tokens=8
      )
    )

  step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
  want = step(hidden_BTD, head_DV, targets_BT)
  got = step(
    jax.device_put(hidden_BTD, on("data")),
    jax.device_put(head_DV, on(None, "tensor")),
    jax.device_put(targets_BT, on("data")),
  )
  for got_leaf, want_leaf in zip(
    jax.tree.leaves(got), jax.tree.leaves(want), strict=True
  ):
    np.testing.assert_allclose(got_leaf, want_leaf, atol=2e-5, rtol=1e-5)


def _support_probs(logits_BTV, targets_BT, support, temperature):
  """Computes top-k, then top-p, in float64; the target is always kept."""
  probs_BTV = np.zeros(logits_BTV.shape)
  for b, t in np.ndindex(*targets_BT.shape):
    weights_V = np.exp(logits_BTV[b, t] / temperature)
    order = np.argsort(-weights_V)[: support.top_k or None]
    share = weights_V[order] / weights_V[order].sum()
    num_kept = np.searchsorted(np.cumsum(share), support.top_p) + 1
    kept = np.union1d(order[:num_kept], targets_BT[b, t])
    probs_BTV[b, t, kept] = weights_V[kept] / weights_V[kept].sum()
  return probs_BTV


@pytest.mark.parametrize("temperature", [0.7, 1.3])
@pytest.mark.parametrize(
  "support",
  [
    logprobs.Support(top_p=0.8, top_k=0),
    logprobs.Support(top_p=1.0, top_k=6),
    logprobs.Support(top_p=0.6, top_k=20),
    logprobs.Support(top_p=1e-6, top_k=0),
    logprobs.Support(top_p=1.0, top_k=_V + 5),
  ],
)
def test_support_renormalizes_the_distribution(support, temperature):
  logits_BTV = np.random.default_rng(0).normal(size=(_B, _T, _V))
  # Some targets are in the support, and some are not.
  targets_BT = np.argsort(-logits_BTV)[..., 2]
  targets_BT[:, ::3] = np.random.default_rng(1).integers(0, _V, (_B, 13))

  def of(logits_BTV):
    stats = logprobs.from_logits(
      logits_BTV, targets_BT, temperature=temperature, support=support
    )
    return jnp.sum(stats.logprobs), stats

  grad_BTV, stats = jax.grad(of, has_aux=True)(
    jnp.asarray(logits_BTV, jnp.float32)
  )
  probs_BTV = _support_probs(logits_BTV, targets_BT, support, temperature)
  picked_BT = np.take_along_axis(probs_BTV, targets_BT[..., None], -1)[..., 0]
  np.testing.assert_allclose(stats.logprobs, np.log(picked_BT), atol=1e-5)
  surprise_BTV = np.log(np.where(probs_BTV > 0.0, probs_BTV, 1.0))
  np.testing.assert_allclose(
    stats.entropy, -(probs_BTV * surprise_BTV).sum(-1), atol=1e-5
  )
  want_BTV = (np.eye(_V)[targets_BT] - probs_BTV) / temperature
  np.testing.assert_allclose(grad_BTV, want_BTV, atol=1e-5)


def test_gradients_over_a_support_are_finite_and_independent_of_chunks():
  hidden_BTD, head_DV, targets_BT = _batch()
  support = logprobs.Support(top_p=0.5, top_k=10)

  def of(hidden_BTD, head_DV, chunk_tokens):
    stats = logprobs.of_targets(
      hidden_BTD,
      head_DV,
      targets_BT,
      temperature=0.9,
      chunk_tokens=chunk_tokens,
      support=support,
    )
    return _weighted_sum(stats)

  grad = jax.grad(of, argnums=(0, 1))
  whole, chunked = (grad(hidden_BTD, head_DV, size) for size in (_T, 8))
  for one, other in zip(whole, chunked, strict=True):
    assert jnp.isfinite(one).all()
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
