# SPDX-License-Identifier: Apache-2.0
"""Quantized kernels: published levels, half and a quarter of the bytes.

And never restored but a layer at a time.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from atlas_jax import errors, sharding
from atlas_jax.models import quantized
from conversion import load, rules
from tests import tiny

_FLOAT32 = np.dtype(np.float32)
# Dettmers et al., arXiv:2305.14314, appendix E.
_NF4 = [
  -1.0,
  -0.6961928009986877,
  -0.5250730514526367,
  -0.39491748809814453,
  -0.28444138169288635,
  -0.18477343022823334,
  -0.09105003625154495,
  0.0,
  0.07958029955625534,
  0.16093020141124725,
  0.24611230194568634,
  0.33791524171829224,
  0.44070982933044434,
  0.5626170039176941,
  0.7229568362236023,
  1.0,
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
  """Returns a model, its parameters, and these quantized in each way."""
  directory = tmp_path_factory.mktemp("quantized") / "hf"
  model, params = tiny.write_checkpoint(
    directory, "qwen3", **tiny.blocks("qwen3")
  )
  kept = {
    kind: load.load(directory, model, param_dtype=kind)
    for kind in quantized.KINDS
  }
  return model, params, kept


def test_nf4_rounds_to_the_published_levels():
  # Each level, and a value just below the midpoint to the next one.
  halves = np.diff(_NF4) * 0.4999 + _NF4[:-1]
  row = np.concatenate([_NF4, halves, np.zeros(33)]).astype(np.float32)
  row_XI = jnp.asarray(row[None] * 0.25)
  packed, scales = quantized.quantize(row_XI, "nf4", 64)
  assert packed.shape == (1, 32)
  assert packed.dtype == jnp.uint8
  kept = {"nf4": packed, "block_scales": scales}
  got = quantized.restore({"kernel": kept}, _FLOAT32)["kernel"][0]
  expected = 0.25 * np.asarray([*_NF4, *_NF4[:-1], *[0.0] * 33], np.float32)
  np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("kind", quantized.KINDS)
def test_dequantized_kernel_matches_qwix(loaded, kind):
  _, params, kept = loaded
  restored = quantized.restore(kept[kind], _FLOAT32)
  how = {
    "int8": {"qtype": jnp.int8},
    "nf4": {"qtype": "nf4", "scale_dtype": jnp.bfloat16},
  }[kind]
  # By hand: the input axes, and the one that is split into blocks.
  for name, inputs, block in (
    (("attention", "q"), {1}, {1: 64}),
    (("attention", "o"), {1, 2}, {2: 32}),
    (("mlp", "down"), {1}, {1: 64}),
  ):
    kernel, got = (
      tree["layers"][name[0]][name[1]]["kernel"] for tree in (params, restored)
    )
    tiled = block if kind == "nf4" else {}
    channels = set(range(kernel.ndim)) - (set(tiled) if tiled else inputs)
    made = qwix.quantize(
      kernel, **how, channelwise_axes=channels, tiled_axes=tiled
    )
    # The scale is exact in bfloat16; the product is taken in float32.
    expected = qwix.dequantize(made.astype(jnp.float32))
    np.testing.assert_array_equal(got, expected)
    gap = float(jnp.linalg.norm(got - kernel) / jnp.linalg.norm(kernel))
    assert gap == pytest.approx({"int8": 0.0065, "nf4": 0.092}[kind], rel=0.1)


def test_parameters_other_than_kernels_stay_in_bfloat16(loaded):
  _, params, kept = loaded
  for kind in quantized.KINDS:
    names = {path for path, _ in rules.flatten(kept[kind])}
    plain = {
      path: leaf.dtype
      for path, leaf in rules.flatten(kept[kind])
      if path in dict(rules.flatten(params))
    }
    assert set(plain.values()) == {jnp.dtype(jnp.bfloat16)}
    assert {"embed/embedding", "head/kernel", "final_norm/scale"} <= set(plain)
    assert f"layers/mlp/up/kernel/{kind}" in names
    assert quantized.kind_of(kept[kind]) == kind
  assert quantized.kind_of(params) is None


def test_int8_takes_half_of_the_bytes_of_bfloat16_and_nf4_a_quarter():
  # Large enough that kernels dominate.
  model = tiny.build(
    "llama", **{**tiny.blocks("llama"), "intermediate_size": 1024}
  )

  def num_bytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

  whole = num_bytes(load.describe(model, "bfloat16")["layers"])
  parts = {
    kind: num_bytes(load.describe(model, kind)["layers"]) / whole
    for kind in quantized.KINDS
  }
  assert parts == pytest.approx({"int8": 0.51, "nf4": 0.27}, abs=0.01)


def test_int8_logits_are_closer_to_the_model_than_nf4(loaded):
  model, params, kept = loaded
  batch = tiny.batch(model)
  expected = model.logits(params, *batch)
  gaps = {
    kind: float(
      jnp.linalg.norm(model.logits(kept[kind], *batch) - expected)
      / jnp.linalg.norm(expected)
    )
    for kind in quantized.KINDS
  }
  assert gaps["int8"] < 0.04
  assert gaps["int8"] < gaps["nf4"] < 0.5


@pytest.mark.parametrize("kind", quantized.KINDS)
def test_decoder_computes_with_dequantized_kernels(loaded, kind):
  model, _, kept = loaded
  batch = tiny.batch(model)
  whole = quantized.whole(kept[kind], _FLOAT32)
  expected = model.logits(whole, *batch)
  np.testing.assert_array_equal(model.logits(kept[kind], *batch), expected)
  for got, state in zip(
    model.states(kept[kind], *batch), model.states(whole, *batch), strict=True
  ):
    np.testing.assert_array_equal(got, state)
  assert {leaf.dtype for leaf in jax.tree.leaves(whole)} == {_FLOAT32}


@pytest.mark.parametrize("kind", quantized.KINDS)
def test_sharding_changes_no_logit(loaded, kind):
  model, _, kept = loaded
  batch = tiny.batch(model, batch_size=4)
  expected = jax.jit(model.logits)(kept[kind], *batch)
  mesh = tiny.mesh(data=2, fsdp=2, tensor=2)
  places = sharding.of_params(mesh, kept[kind])
  placed = jax.device_put(kept[kind], places)
  up = placed["layers"]["mlp"]["up"]["kernel"]
  scales = up["channel_scales" if kind == "int8" else "block_scales"]
  assert up[kind].addressable_shards[0].data.size * 4 == up[kind].size
  split = 2 if kind == "int8" else 4
  assert scales.addressable_shards[0].data.size * split == scales.size
  rows = jax.device_put(batch, sharding.of_batch(mesh))
  got = jax.jit(model.logits)(placed, *rows)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)
  whole = quantized.whole(placed, _FLOAT32)
  assert whole["layers"]["mlp"]["up"]["kernel"].sharding == up[kind].sharding


@pytest.mark.parametrize("kind", quantized.KINDS)
def test_no_kernel_is_saved_for_the_backward_pass(loaded, kind):
  model, _, kept = loaded
  model = tiny.build(
    "qwen3", **tiny.blocks("qwen3"), remat="dots", num_hidden_layers=16
  )
  kept = load.describe(model, kind)
  batch = tiny.batch(model)

  def loss(scale, params):
    ends = {**params, "final_norm": {"scale": scale}}
    return jnp.sum(model.logits(ends, *batch))

  # The input of the first layer needs a gradient as well.
  def full(embedding, scale, params):
    params = {**params, "embed": {"embedding": embedding}}
    return loss(scale, params)

  compiled = (
    jax.jit(jax.grad(full, argnums=(0, 1)))
    .lower(kept["embed"]["embedding"], kept["final_norm"]["scale"], kept)
    .compile()
    .memory_analysis()
  )
  restored = sum(
    4 * leaf.size for leaf in jax.tree.leaves(model.abstract_params["layers"])
  )
  assert compiled.temp_size_in_bytes < restored / 3


def test_mesh_that_splits_blocks_is_rejected_with_its_flag(loaded):
  model, _, _ = loaded
  mesh = tiny.mesh(fsdp=4)  # 128 inputs are two blocks.
  sharding.of_params(mesh, load.describe(model, "int8"))
  with pytest.raises(errors.ConfigError, match="block_scales") as caught:
    sharding.of_params(mesh, load.describe(model, "nf4"))
  assert caught.value.where == "--config.mesh.fsdp=4"


def test_inputs_that_do_not_divide_into_blocks_are_rejected():
  model = tiny.build("qwen3")
  with pytest.raises(
    errors.ConfigError, match="cannot be stored as nf4"
  ) as caught:
    quantized.describe(model.abstract_params, "nf4")
  assert "param_dtype to int8" in caught.value.fix
  quantized.describe(model.abstract_params, "int8")


def test_quantize_is_traceable_and_keeps_zeros():
  zeros = jnp.zeros((3, 64))
  for kind, name in (("int8", "channel_scales"), ("nf4", "block_scales")):
    rounded = jax.jit(
      functools.partial(quantized.quantize, kind=kind, block=64)
    )
    values, scales = rounded(zeros)
    kept = {"kernel": {kind: values, name: scales}}
    np.testing.assert_array_equal(
      quantized.restore(kept, _FLOAT32)["kernel"], np.zeros((3, 64))
    )
