# SPDX-License-Identifier: Apache-2.0
"""Tests that the planned bytes of an update match those on the devices."""

import dataclasses
import functools

import jax
import pytest

from atlas_jax import sharding
from atlas_jax.models import decoder, decoder_config, lora
from atlas_jax.train import gkd, train_state, trainable
from atlas_jax.train import optimizer as train_optimizer
from configs import optimizer as optimizers
from scripts.plan import update_bytes
from tests import tiny

_FIELDS = {
  "vocab_size": 4096,
  "hidden_size": 128,
  "intermediate_size": 256,
  "num_hidden_layers": 6,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 32,
}
_ROWS = update_bytes.Rows(
  per_device=2, num_microbatches=1, length=128, chunk_tokens=64
)
_NO_ADAPTERS = lora.Lora(rank=0, alpha=1.0, targets=())
_ADAPTERS = lora.Lora(rank=2, alpha=1.0, targets=("mlp/up",))
_STATE = ("parameters", "frozen base", "optimizer", "reference")


def _build(remat="block"):
  return functools.partial(
    decoder.build,
    dtype="float32",
    attention="xla",
    remat=remat,
    unroll=1,
  )


def _optimizer(name="adamw"):
  config = optimizers.get_config()
  config.name = name
  return train_optimizer.make_optimizer(lambda _: 0.05, **config)


def _describe(mesh, *, remat="block", adapters=_NO_ADAPTERS, **more):
  """Describes a policy and its state without creating arrays."""
  fields = tiny.fields("qwen3", **_FIELDS)
  model = _build(remat)(decoder_config.from_hf(fields))
  model = dataclasses.replace(model, layout=sharding.of_activations(mesh))
  params = train_state.placed(
    model.abstract_params, sharding.of_params(mesh, model.abstract_params)
  )
  policy, trained = trainable.split(model, params, adapters)
  trained = train_state.placed(trained, sharding.of_params(mesh, trained))
  reference = None if policy.frozen else trained
  state = train_state.describe(
    trained, _optimizer(), mesh=mesh, reference=reference, **more
  )
  return policy, state


def _mesh(**sizes):
  return sharding.make_mesh(**{"data": 1, "fsdp": 1, "tensor": 1, **sizes})


def _held(tree, device, *, on_host):
  """Counts the bytes of live arrays on a device, or in its host's memory."""
  kind = "pinned_host" if on_host else "device"
  return sum(
    shard.data.nbytes
    for leaf in jax.tree.leaves(tree)
    for shard in leaf.addressable_shards
    if shard.device == device and leaf.sharding.memory_kind == kind
  )


@pytest.mark.parametrize("adapters", [_NO_ADAPTERS, _ADAPTERS])
@pytest.mark.parametrize("is_offloaded", [False, True])
def test_the_state_takes_exactly_the_planned_bytes(adapters, is_offloaded):
  mesh = _mesh(data=2, fsdp=2, tensor=2)
  offload = train_state.Offload(
    optimizer=is_offloaded, reference=is_offloaded and adapters.rank == 0
  )
  policy, described = _describe(mesh, adapters=adapters, offload=offload)
  planned = update_bytes.of_update(
    policy, described, _build(), _ROWS, mesh=mesh
  )

  model = dataclasses.replace(policy.base, layout=None)
  params = jax.device_put(
    tiny.params_of(model), sharding.of_params(mesh, model.abstract_params)
  )
  real, trained = trainable.create(
    model, params, adapters=adapters, mesh=mesh, key=jax.random.key(0)
  )
  state = train_state.create(
    trained,
    _optimizer(),
    mesh=mesh,
    reference=None if real.frozen else jax.tree.map(jax.numpy.copy, trained),
    offload=offload,
  )
  parts = dict(
    zip(
      _STATE,
      (state.params, real.frozen, state.opt_state, state.reference),
      strict=True,
    )
  )
  for device in jax.devices():
    for name, tree in parts.items():
      assert _held(tree, device, on_host=False) == planned[name], name
  held = _held(state, jax.devices()[0], on_host=True)
  assert held == update_bytes.num_bytes(described, on_host=True)
  assert (held > 0) == is_offloaded


def test_gradients_have_their_parameters_dtype_and_a_float32_sum():
  place = sharding.replicated(_mesh(fsdp=8))
  several = dataclasses.replace(_ROWS, num_microbatches=2)
  for dtype, bytes_each, with_sum in (("float32", 4, 8), ("bfloat16", 2, 6)):
    params = {"w": jax.ShapeDtypeStruct((10,), dtype, sharding=place)}
    assert update_bytes._gradients(params, _ROWS) == 10 * bytes_each
    assert update_bytes._gradients(params, several) == 10 * with_sum


def _teacher(mesh):
  """Describes a teacher of another width; see `_describe`."""
  fields = {**_FIELDS, "hidden_size": 192, "num_hidden_layers": 8}
  model = _build("none")(decoder_config.from_hf(tiny.fields("qwen3", **fields)))
  model = dataclasses.replace(model, layout=sharding.of_activations(mesh))
  places = sharding.of_params(mesh, model.abstract_params)
  params = train_state.placed(model.abstract_params, places)
  return gkd.Teacher(model, params)


@pytest.mark.slow
def test_the_state_with_a_teacher_takes_the_planned_bytes():
  mesh = _mesh(fsdp=4, tensor=2)
  policy, state = _describe(mesh)
  state = state._replace(reference=None)
  teacher = _teacher(mesh)
  planned = update_bytes.of_update(
    policy, state, _build(), _ROWS, mesh=mesh, teacher=teacher
  )
  compiled = update_bytes.compile_update(
    policy, state, _optimizer(), _ROWS, mesh=mesh, teacher=teacher
  )
  assert planned["teacher"] == update_bytes.num_bytes(teacher.params) > 0
  resident = sum(planned[name] for name in (*_STATE, "teacher"))
  assert 0 < compiled.arguments - resident <= 4 * 4 * 2 * 128
  temporaries = sum(planned.values()) - resident
  assert compiled.temporaries / 1.5 <= temporaries <= compiled.temporaries * 1.5


@pytest.mark.slow
@pytest.mark.parametrize(
  ("remat", "num_microbatches", "sizes"),
  [
    ("block", 1, {"fsdp": 8}),
    ("none", 1, {"fsdp": 8}),
    ("dots", 2, {"fsdp": 4, "tensor": 2}),
  ],
)
def test_an_update_takes_the_planned_bytes_within_half(
  remat, num_microbatches, sizes
):
  mesh = _mesh(**sizes)
  rows = dataclasses.replace(_ROWS, num_microbatches=num_microbatches)
  policy, state = _describe(mesh, remat=remat)
  planned = update_bytes.of_update(
    policy, state, _build(remat), rows, mesh=mesh
  )
  compiled = update_bytes.compile_update(
    policy, state, _optimizer(), rows, mesh=mesh
  )
  resident = sum(planned[name] for name in _STATE)
  # The rest of the arguments is the batch, int32, of this device's rows.
  num_tokens = rows.per_device * rows.num_microbatches * rows.length
  batch_bytes = compiled.arguments - resident
  assert 0 < batch_bytes <= 4 * 4 * num_tokens
  temporaries = sum(planned.values()) - resident
  assert compiled.temporaries / 1.5 <= temporaries
  assert temporaries <= compiled.temporaries * 1.5


def test_recomputed_activations_are_not_kept():
  mesh = _mesh(fsdp=8)
  activations = {}
  for remat in ("none", "dots", "block", "offload"):
    policy, state = _describe(mesh, remat=remat)
    rows = dataclasses.replace(_ROWS, chunk_tokens=8)
    planned = update_bytes.of_update(
      policy, state, _build(remat), rows, mesh=mesh
    )
    activations[remat] = planned["activations"]
  assert (
    activations["none"]
    > activations["dots"]
    > activations["block"]
    > activations["offload"]
  )


def test_adapters_need_no_gradients_of_the_base():
  mesh = _mesh(fsdp=8)
  policy, state = _describe(mesh, adapters=_ADAPTERS)
  planned = update_bytes.of_update(policy, state, _build(), _ROWS, mesh=mesh)
  whole = update_bytes.of_update(*_describe(mesh), _build(), _ROWS, mesh=mesh)
  assert planned["frozen base"] == whole["parameters"]
  assert planned["gradients"] < whole["gradients"] / 50
  assert planned["activations"] <= whole["activations"]


def test_a_cache_is_sharded_by_rows():
  mesh = _mesh(data=2, fsdp=2, tensor=2)
  model = _describe(mesh)[0].model
  found = update_bytes.of_cache(model, num_rows=8, num_slots=10, mesh=mesh)
  # Keys and values in float32; the position and segment of each slot.
  keys = 2 * 6 * 2 * 10 * 2 * 32 * 4
  assert found == keys + 2 * 2 * 10 * 4
