# SPDX-License-Identifier: Apache-2.0
"""Trained parameters are sharded, and merged with their base's sharding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax import errors, sharding
from atlas_jax.models import lora, quantized
from atlas_jax.train import trainable
from conversion import load
from tests import tiny

_LORA = lora.Lora(rank=2, alpha=4.0, targets=("attention/[qkvo]", "mlp/.*"))
_SHAPE = {
  "hidden_size": 24,
  "vocab_size": 36,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
}


def _create(adapters, **sizes):
  mesh = sharding.make_mesh(**{"data": 1, "fsdp": 1, "tensor": 1, **sizes})
  model = tiny.build("qwen3", **_SHAPE)
  params = jax.device_put(
    tiny.params_of(model), sharding.of_params(mesh, model.abstract_params)
  )
  return params, *trainable.create(
    model, params, adapters=adapters, mesh=mesh, key=jax.random.key(0)
  )


def test_without_adapters_all_parameters_are_trained():
  off = lora.Lora(rank=0, alpha=1.0, targets=())
  params, policy, trained = _create(off, data=8)
  assert trained is params
  assert policy.model is policy.base
  assert policy.merged_params(trained) is params
  assert policy.identity()["model.num_layers"] == "2"
  assert "base" not in policy.identity()
  same = jax.tree.map(lambda a, b: a is b, policy.all_params(trained), params)
  assert all(jax.tree.leaves(same))


def test_adapters_and_base_match_on_any_mesh_and_stay_sharded():
  _, wide, wide_adapters = _create(_LORA, data=2, fsdp=2, tensor=2)
  _, flat, flat_adapters = _create(_LORA, fsdp=-1)
  assert wide.identity() == flat.identity()
  jax.tree.map(np.testing.assert_array_equal, wide_adapters, flat_adapters)
  q = wide_adapters["layers"]["attention"]["q"]["lora_a"]
  assert q.addressable_shards[0].data.shape == (2, 12, 2)

  adapters = jax.tree.map(lambda x: x + 0.1, wide_adapters)
  merged = wide.merged_params(adapters)
  placed = jax.tree.map(
    lambda a, b: a.sharding == b.sharding, merged, wide.frozen
  )
  assert all(jax.tree.leaves(placed))
  np.testing.assert_allclose(
    merged["layers"]["mlp"]["up"]["kernel"],
    lora.merge(wide.frozen, adapters, 2.0)["layers"]["mlp"]["up"]["kernel"],
    rtol=1e-6,
  )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  directory = tmp_path_factory.mktemp("policy") / "hf"
  model, _ = tiny.write_checkpoint(
    directory, "qwen3", num_hidden_layers=1, **tiny.blocks("qwen3")
  )
  return directory, model


def _create_kept(written, kind, adapters=_LORA, *, remat="dots", **sizes):
  """Creates a policy over a quantized base."""
  directory, model = written
  model = tiny.build(
    "qwen3", num_hidden_layers=1, remat=remat, **tiny.blocks("qwen3")
  )
  mesh = tiny.mesh(**sizes)
  params = load.load(
    directory,
    model,
    param_dtype=kind,
    shardings=sharding.of_params(mesh, load.describe(model, kind)),
  )
  return trainable.create(
    model, params, adapters=adapters, mesh=mesh, key=jax.random.key(0)
  )


@pytest.mark.parametrize("kind", quantized.KINDS)
def test_merged_parameters_are_the_quantized_base_with_adapters(written, kind):
  policy, adapters = _create_kept(written, kind, fsdp=2, tensor=2)
  adapters = jax.tree.map(lambda x: x + 0.1, adapters)
  merged = policy.merged_params(adapters)

  single, _ = _create_kept(written, kind)
  whole = quantized.whole(single.frozen, np.dtype(np.float32))
  expected = lora.merge(whole, jax.device_get(adapters), _LORA.scale)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
    merged,
    expected,
  )
  places = sharding.of_params(tiny.mesh(fsdp=2, tensor=2), merged)
  assert jax.tree.map(lambda leaf: leaf.sharding, merged) == places
  assert {leaf.dtype.name for leaf in jax.tree.leaves(merged)} == {"float32"}
  # The identity depends on the quantized base, not on its mesh.
  assert policy.identity() == single.identity()
  assert policy.identity()["base.kept_as"] == kind
  other, _ = _create_kept(written, {"int8": "nf4", "nf4": "int8"}[kind])
  assert policy.identity()["base"] != other.identity()["base"]


def test_merged_parameters_have_the_trainers_dtype(
  written,
):
  policy, adapters = _create_kept(written, "nf4")
  coarse = dataclasses.replace(policy.base, dtype=np.dtype(jnp.bfloat16))
  policy = dataclasses.replace(policy, base=coarse)
  merged = policy.merged_params(adapters)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(merged)} == {"bfloat16"}
  # Zero adapters leave the dequantized kernels.
  restored = quantized.restore(policy.frozen, coarse.dtype)
  jax.tree.map(np.testing.assert_array_equal, merged, restored)


def test_quantized_parameters_require_adapters_and_remat(
  written,
):
  off = lora.Lora(rank=0, alpha=1.0, targets=())
  with pytest.raises(errors.ConfigError, match="cannot be trained") as caught:
    _create_kept(written, "int8", off)
  assert caught.value.where == "--config.model.param_dtype=int8"
  assert "--config.lora.rank=16" in caught.value.fix
  with pytest.raises(
    errors.ConfigError, match="does not support remat=none"
  ) as caught:
    _create_kept(written, "nf4", remat="none")
  assert "remat=dots" in caught.value.fix
