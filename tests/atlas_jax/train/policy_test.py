# SPDX-License-Identifier: Apache-2.0
"""What is trained: split over the mesh, and merged where the base is."""

import jax
import numpy as np

from atlas_jax import sharding
from atlas_jax.models import lora
from atlas_jax.train import policy as train_policy
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
  return params, *train_policy.create(
    model, params, adapters=adapters, mesh=mesh, key=jax.random.key(0)
  )


def test_without_adapters_everything_is_trained_as_it_is():
  off = lora.Lora(rank=0, alpha=1.0, targets=())
  params, policy, trained = _create(off, data=8)
  assert trained is params
  assert policy.model is policy.base
  assert policy.merged(trained) is params
  assert policy.identity()["model.num_layers"] == "2"
  assert "base" not in policy.identity()
  same = jax.tree.map(lambda a, b: a is b, policy.whole(trained), params)
  assert all(jax.tree.leaves(same))


def test_adapters_and_base_are_the_same_on_any_mesh_and_stay_split():
  _, wide, wide_adapters = _create(_LORA, data=2, fsdp=2, tensor=2)
  _, flat, flat_adapters = _create(_LORA, fsdp=-1)
  assert wide.identity() == flat.identity()
  jax.tree.map(np.testing.assert_array_equal, wide_adapters, flat_adapters)
  q = wide_adapters["layers"]["attention"]["q"]["lora_a"]
  assert q.addressable_shards[0].data.shape == (2, 12, 2)

  adapters = jax.tree.map(lambda x: x + 0.1, wide_adapters)
  merged = wide.merged(adapters)
  placed = jax.tree.map(
    lambda a, b: a.sharding == b.sharding, merged, wide.frozen
  )
  assert all(jax.tree.leaves(placed))
  np.testing.assert_allclose(
    merged["layers"]["mlp"]["up"]["kernel"],
    lora.merge(wide.frozen, adapters, 2.0)["layers"]["mlp"]["up"]["kernel"],
    rtol=1e-6,
  )
