# SPDX-License-Identifier: Apache-2.0
"""The mesh: it changes no value, and refuses what does not divide."""

import jax
import numpy as np
import pytest

from atlas_jax import errors, sharding
from tests import tiny

_EVEN = {
  "vocab_size": 38,
  "hidden_size": 24,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
}


def test_a_mesh_changes_no_logit():
  model = tiny.build("qwen2", **_EVEN)
  params, batch = tiny.params_of(model), tiny.batch(model, batch_size=4)
  expected = jax.jit(model.logits)(params, *batch)
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)

  sharded = jax.device_put(
    params, sharding.of_params(mesh, model.abstract_params)
  )
  rows = jax.device_put(batch, sharding.of_batch(mesh))
  got = jax.jit(model.logits)(sharded, *rows)

  kernel = sharded["layers"]["attention"]["q"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (2, 12, 2, 8)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)


def test_every_parameter_of_every_family_has_a_rule():
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  for family in tiny.FAMILIES:
    model = tiny.build(family, **_EVEN)
    sharding.of_params(mesh, model.abstract_params)


def test_a_parameter_without_a_rule_is_an_error():
  mesh = sharding.make_mesh(data=8, fsdp=1, tensor=1)
  leaf = jax.ShapeDtypeStruct((2, 2), np.float32)
  with pytest.raises(ValueError, match="embed/other"):
    sharding.of_params(mesh, {"embed": {"other": leaf}})


def test_one_axis_takes_what_is_left():
  mesh = sharding.make_mesh(data=2, fsdp=-1, tensor=2)
  assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
  "sizes", [(3, -1, 1), (2, 2, 1), (-1, -1, 1), (0, 1, 8), (-2, 4, -1)]
)
def test_a_mesh_that_does_not_cover_the_devices_is_refused(sizes):
  data, fsdp, tensor = sizes
  with pytest.raises(errors.ConfigError) as caught:
    sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor)
  assert "--config.mesh" in caught.value.where


def test_an_axis_that_does_not_divide_is_named():
  model = tiny.build("qwen2", **{**_EVEN, "vocab_size": 37})
  mesh = sharding.make_mesh(data=4, fsdp=1, tensor=2)
  with pytest.raises(errors.ConfigError, match="embed/embedding") as caught:
    sharding.of_params(mesh, model.abstract_params)
  assert caught.value.where == "--config.mesh.tensor=2"


@pytest.mark.parametrize(
  ("size", "per_device", "parts"), [(8, 0, 1), (8, 2, 1), (8, 1, 2), (24, 2, 3)]
)
def test_a_batch_goes_through_the_devices_in_parts(size, per_device, parts):
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  found = sharding.num_microbatches(mesh, size=size, per_device=per_device)
  assert found == parts


@pytest.mark.parametrize(
  ("size", "per_device", "flag"),
  [
    (6, 1, "--config.batch.size=6"),
    (0, 1, "--config.batch.size=0"),
    (8, 3, "--config.batch.per_device=3"),
    (8, 4, "--config.batch.per_device=4"),
    (8, -1, "--config.batch.per_device=-1"),
  ],
)
def test_a_batch_that_does_not_divide_is_refused_by_flag(
  size, per_device, flag
):
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  with pytest.raises(errors.ConfigError, match="not divide") as caught:
    sharding.num_microbatches(mesh, size=size, per_device=per_device)
  assert caught.value.where == flag
