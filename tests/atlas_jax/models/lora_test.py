# SPDX-License-Identifier: Apache-2.0
"""Adapters: initialization, merging and targets."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax import errors
from atlas_jax.models import lora
from tests import tiny

_LORA = lora.Lora(
  rank=3, alpha=7.0, targets=("attention/[qkvo]", "mlp/(gate|up|down)")
)


def _adapters(model, settings=_LORA):
  abstract = lora.only(lora.adapt(model, settings).abstract_params)
  return lora.init(jax.random.key(0), abstract)


def test_new_adapter_changes_no_bit_and_matches_pefts_init():
  model = tiny.build("qwen3")
  params, adapters = tiny.params_of(model), _adapters(model)
  batch = tiny.batch(model)

  got = lora.adapt(model, _LORA).logits(lora.join(params, adapters), *batch)

  np.testing.assert_array_equal(got, model.logits(params, *batch))
  for layer in ("q", "o"):
    a = adapters["layers"]["attention"][layer]["lora_a"]
    bound = 1.0 / math.sqrt(math.prod(a.shape[1:-1]))
    assert 0.8 * bound < np.abs(a).max() <= bound


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_merged_model_matches_the_adapted_one(family):
  model = tiny.build(family)
  settings = _LORA
  if family == "qwen3_moe":
    settings = lora.Lora(rank=3, alpha=7.0, targets=("attention/[qkvo]",))
  params = tiny.params_of(model)
  adapters = jax.tree.map(lambda x: x + 0.1, _adapters(model, settings))
  merged = lora.merge(params, adapters, settings.scale)
  batch = tiny.batch(model)

  adapted = lora.adapt(model, settings)
  got = adapted.logits(lora.join(params, adapters), *batch)

  np.testing.assert_allclose(got, model.logits(merged, *batch), atol=5e-5)
  assert np.abs(got - model.logits(params, *batch)).max() > 0.1
  # Parameters without an adapter are not copied.
  assert merged["embed"]["embedding"] is params["embed"]["embedding"]


def test_merge_computes_in_float32_and_keeps_the_dtype():
  params = {"kernel": jnp.ones((1, 2, 2), jnp.bfloat16)}
  a, b = jnp.full((1, 2, 1), 1e-3), jnp.ones((1, 1, 2))
  merged = lora.merge(params, {"lora_a": a, "lora_b": b}, 100.0)["kernel"]
  assert merged.dtype == jnp.bfloat16
  np.testing.assert_array_equal(merged, np.full((1, 2, 2), 1.1, merged.dtype))


@pytest.mark.parametrize(
  ("family", "target"),
  [
    ("qwen3", "attention/w"),
    ("qwen3_moe", "mlp/(gate|up|down)"),
    ("qwen3_moe", "mixture/.*"),
  ],
)
def test_target_that_matches_no_layer_is_rejected(family, target):
  settings = lora.Lora(rank=2, alpha=1.0, targets=("attention/q", target))
  with pytest.raises(errors.ConfigError, match="attention/k"):
    lora.adapt(tiny.build(family), settings)


@pytest.mark.parametrize(("rank", "alpha"), [(-1, 1.0), (4, 0.0)])
def test_invalid_rank_and_alpha_are_rejected(rank, alpha):
  with pytest.raises(errors.ConfigError, match=f"rank={rank} and"):
    lora.Lora(rank=rank, alpha=alpha, targets=())


def test_fingerprint_detects_one_bit_and_a_permutation():
  params = {"x": jnp.arange(12.0).reshape(3, 4), "y": jnp.ones(3, jnp.bfloat16)}
  other = {**params, "x": jnp.nextafter(params["x"], 99.0)}
  exchanged = {**params, "x": params["x"][::-1]}
  names = {
    lora.fingerprint(lora.checksums(each))
    for each in (params, other, exchanged)
  }
  assert len(names) == 3
  again = jax.tree.map(jnp.copy, params)
  assert lora.fingerprint(lora.checksums(again)) in names
