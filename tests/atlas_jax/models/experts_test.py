# SPDX-License-Identifier: Apache-2.0
"""Mixture of experts against NumPy, and its balance loss."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.models import experts
from tests import tiny


def _mixture(**changes):
  config = tiny.build("qwen3_moe", **changes).config
  rngs = nnx.Rngs(params=jax.random.key(0))
  return experts.Mixture(
    config, config.experts, dtype=jnp.float32, rngs=rngs
  ), config.experts


@pytest.mark.parametrize("normalise", [True, False])
def test_output_is_the_weighted_sum_over_chosen_experts(normalise):
  module, sizes = _mixture(norm_topk_prob=normalise, initializer_range=1.0)
  x = jax.random.normal(jax.random.key(1), (2, 3, 21))

  got, _ = module(x, jnp.ones((2, 3), bool), None)

  gate, up, down = (np.asarray(k[...]) for k in _kernels(module))
  logits = np.asarray(x) @ np.asarray(module.router.kernel[...])
  probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  expected = np.zeros(x.shape)
  for place in np.ndindex(2, 3):
    chosen = np.argsort(-probs[place])[: sizes.num_chosen]
    weights = probs[place][chosen]
    if normalise:
      weights = weights / weights.sum()
    for weight, e in zip(weights, chosen, strict=True):
      opened = np.asarray(x[place]) @ gate[e]
      opened = opened / (1.0 + np.exp(-opened))
      closed = (opened * (np.asarray(x[place]) @ up[e])) @ down[e]
      expected[place] += weight * closed
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def _kernels(module):
  return module.gate, module.up, module.down


def test_load_counts_choices_of_counted_tokens():
  module, sizes = _mixture()
  x = jax.random.normal(jax.random.key(1), (2, 4, 21))
  counted = jnp.array([[True, True, False, False], [True, False, False, False]])

  _, load = module(x, counted, None)

  assert float(load.counts.sum()) == 3 * sizes.num_chosen
  assert float(load.probs.sum()) == pytest.approx(3.0, rel=1e-5)


def test_balance_loss_is_minimal_for_a_uniform_load():
  even = experts.Load(jnp.full((4,), 2.0), jnp.full((4,), 2.0))
  uneven = experts.Load(
    jnp.array([8.0, 0.0, 0.0, 0.0]), jnp.array([6.5, 0.5, 0.5, 0.5])
  )
  assert float(experts.balance_loss(even, 8.0)) == pytest.approx(1.0)
  assert float(experts.balance_loss(uneven, 8.0)) > 3.0


def test_dense_model_has_zero_balance_loss():
  model = tiny.build("qwen3")
  _, balance = model.hidden_and_balance(
    tiny.params_of(model), *tiny.batch(model)
  )
  assert float(balance) == 0.0
