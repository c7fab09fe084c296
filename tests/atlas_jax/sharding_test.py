# SPDX-License-Identifier: Apache-2.0
"""Tests that sharding changes no value and rejects indivisible sizes."""

import dataclasses

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


def test_a_parameter_without_a_rule_is_rejected():
  mesh = sharding.make_mesh(data=8, fsdp=1, tensor=1)
  leaf = jax.ShapeDtypeStruct((2, 2), np.float32)
  with pytest.raises(ValueError, match="embed/other"):
    sharding.of_params(mesh, {"embed": {"other": leaf}})


def test_one_axis_uses_the_remaining_devices():
  mesh = sharding.make_mesh(data=2, fsdp=-1, tensor=1, context=2)
  sizes = {"data": 2, "fsdp": 2, "expert": 1, "context": 2, "tensor": 1}
  assert dict(mesh.shape) == sizes
  assert sharding.sizes(8, data=2, fsdp=-1, context=2) == sizes


def test_outer_axes_cross_slices():
  devices = [_Device(i, slice_index=i // 4) for i in range(16)]
  grid = sharding.arrange((2, 4, 1, 1, 2), devices, 4)
  slices = np.vectorize(lambda device: device.slice_index)(grid)
  # `data` spans two slices, `fsdp` the other two; `tensor` stays in one slice.
  np.testing.assert_array_equal(
    slices[:, :, 0, 0, 0], [[0, 0, 1, 1], [2, 2, 3, 3]]
  )
  np.testing.assert_array_equal(slices[..., 0], slices[..., 1])


@dataclasses.dataclass(frozen=True)
class _Device:
  """The attributes of a device that `arrange` reads."""

  id: int
  slice_index: int
  process_index: int = 0
  platform: str = "gpu"
  device_kind: str = "none"


def test_one_process_loads_all_rows():
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  assert sharding.share_of_rows(mesh) == (0, 1)


def test_indivisible_row_length_is_rejected():
  mesh = sharding.make_mesh(data=1, fsdp=2, tensor=1, context=4)
  sharding.check_length(mesh, 64, where="--config.packing.length")
  with pytest.raises(errors.ConfigError, match="66 tokens") as caught:
    sharding.check_length(mesh, 66, where="--config.packing.length")
  assert "--config.mesh.context=4" in caught.value.where
  assert "context to 2, or the length to 68" in caught.value.fix


@pytest.mark.parametrize(
  "sizes", [(3, -1, 1), (2, 2, 1), (-1, -1, 1), (0, 1, 8), (-2, 4, -1)]
)
def test_a_mesh_of_the_wrong_size_is_rejected(sizes):
  data, fsdp, tensor = sizes
  with pytest.raises(errors.ConfigError) as caught:
    sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor)
  assert "--config.mesh" in caught.value.where


def test_an_indivisible_dimension_is_reported():
  model = tiny.build("qwen2", **{**_EVEN, "vocab_size": 37})
  mesh = sharding.make_mesh(data=4, fsdp=1, tensor=2)
  with pytest.raises(errors.ConfigError, match="embed/embedding") as caught:
    sharding.of_params(mesh, model.abstract_params)
  assert caught.value.where == "--config.mesh.tensor=2"
  assert "Dimension 0, of size 37" in caught.value.why


def test_all_axes_of_an_indivisible_dimension_are_reported():
  model = tiny.build("qwen2", **_EVEN)
  mesh = sharding.make_mesh(data=1, fsdp=4, tensor=1, context=2)
  sharding.of_params(mesh, model.abstract_params)
  model = tiny.build("qwen2", **{**_EVEN, "hidden_size": 20})
  with pytest.raises(errors.ConfigError, match="does not divide") as caught:
    sharding.of_params(mesh, model.abstract_params)
  assert caught.value.where == "--config.mesh.fsdp=4 --config.mesh.context=2"
  assert "fsdp x context to a divisor of 20, e.g. 4" in caught.value.fix


@pytest.mark.parametrize(
  ("size", "per_device", "parts"), [(8, 0, 1), (8, 2, 1), (8, 1, 2), (24, 2, 3)]
)
def test_number_of_microbatches(size, per_device, parts):
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
def test_an_indivisible_batch_is_rejected_with_its_flag(size, per_device, flag):
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  with pytest.raises(errors.ConfigError, match="must be") as caught:
    sharding.num_microbatches(mesh, size=size, per_device=per_device)
  assert caught.value.where == flag


def test_put_matches_device_put():
  mesh = sharding.make_mesh(data=2, fsdp=4, tensor=1)
  tree = {"a": np.arange(32).reshape(8, 4), "b": (np.ones(16, bool),)}
  ours = sharding.put(tree, sharding.of_batch(mesh))
  theirs = jax.device_put(tree, sharding.of_batch(mesh))
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  assert ours["a"].sharding == theirs["a"].sharding
