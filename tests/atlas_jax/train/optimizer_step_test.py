# SPDX-License-Identifier: Apache-2.0
"""An update does not depend on microbatches or mesh; NaN is skipped."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from atlas_jax import sharding
from atlas_jax.losses import reduce
from atlas_jax.train import optimizer as train_optimizer
from atlas_jax.train import optimizer_step, sft, train_state
from configs import optimizer as optimizers
from tests import tiny

_WIDTH, _ROWS, _TOKENS = 6, 8, 5
_SHAPE = {
  "hidden_size": 24,
  "vocab_size": 36,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
}
_OF_FAMILY = {
  "qwen2": {},
  "gemma2": {},
  "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3},
}


def _optimizer():
  config = optimizers.get_config()
  config.weight_decay = 0.1
  config.adamw = {"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-3}
  return train_optimizer.make_optimizer(lambda _: 0.005, **config)


def _regression(aggregate):
  """Returns a masked regression loss, averaged over tokens or sequences."""

  def loss_fn(params, batch):
    error_BT = jnp.square(batch["x"] @ params["kernel"] - batch["y"])
    loss = reduce.mean(
      error_BT, batch["mask"], aggregate=aggregate, length=_TOKENS
    )
    weight = reduce.count(batch["mask"], aggregate=aggregate)
    worst = jnp.max(error_BT, where=batch["mask"], initial=0.0)
    return loss, (weight, {"loss": loss, "error_max": worst})

  return loss_fn


def _data(seed=0):
  keys = jax.random.split(jax.random.key(seed), 3)
  mask = jax.random.bernoulli(keys[2], 0.5, (_ROWS, _TOKENS))
  return {
    "x": jax.random.normal(keys[0], (_ROWS, _TOKENS, _WIDTH)),
    "y": jax.random.normal(keys[1], (_ROWS, _TOKENS)),
    # One row is fully masked out, and one fully masked in.
    "mask": mask.at[2].set(False).at[5].set(True),
  }


def _start(loss_fn):
  params = {"kernel": jnp.linspace(-1.0, 1.0, _WIDTH)}
  mesh = tiny.mesh(fsdp=8)
  params = jax.device_put(params, sharding.replicated(mesh))
  state = train_state.create(params, _optimizer(), mesh=mesh)
  step = optimizer_step.make_step(
    loss_fn,
    _optimizer(),
    frozen={},
    shardings=train_state.shardings(state),
  )
  return state, step


def _assert_close(left, right):
  # Values near zero are exempt from the relative bound.
  assert jax.tree.structure(left) == jax.tree.structure(right)
  for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
    a, b = np.asarray(a), np.asarray(b)
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * np.abs(b).max())


@pytest.mark.parametrize("aggregate", reduce.AGGREGATES)
@pytest.mark.parametrize("num_microbatches", [2, 8])
def test_microbatches_match_the_whole_batch(aggregate, num_microbatches):
  loss_fn = _regression(aggregate)
  whole, whole_metrics = _start(loss_fn)[1](_start(loss_fn)[0], _data())
  state, step = _start(loss_fn)
  split, split_metrics = step(state, _data(), num_microbatches=num_microbatches)
  _assert_close(split, whole)
  _assert_close(split_metrics, whole_metrics)


def test_grad_norm_is_of_the_whole_loss_before_clipping():
  loss_fn = _regression("token_mean")
  state, step = _start(loss_fn)
  grads = jax.grad(lambda p: loss_fn(p, _data())[0])(state.params)
  _, metrics = step(state, _data(), num_microbatches=4)
  np.testing.assert_allclose(
    metrics["grad_norm"], np.linalg.norm(grads["kernel"]), rtol=1e-6
  )


def test_gradients_of_bfloat16_parameters_are_summed_in_float32():
  def loss_fn(params, batch):
    loss = jnp.sum(batch["x"] * params["w"])
    return loss, (jnp.float32(1.0), {"loss": loss})

  mesh = tiny.mesh()
  params = {"w": jnp.ones(1, jnp.bfloat16, device=sharding.replicated(mesh))}
  state = train_state.create(params, optax.sgd(1.0), mesh=mesh)
  step = optimizer_step.make_step(
    loss_fn,
    optax.sgd(1.0),
    frozen={},
    shardings=train_state.shardings(state),
  )
  x = np.array([1.0, 1 / 512, 1 / 512, 1 / 512], np.float32)
  _, metrics = step(state, {"x": x}, num_microbatches=4)
  # In bfloat16, 1 + 1/512 is 1.
  np.testing.assert_allclose(4 * metrics["grad_norm"], x.sum(), rtol=1e-6)


@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_a_nonfinite_update_is_skipped_and_counted(num_microbatches):
  state, step = _start(_regression("token_mean"))
  step = functools.partial(step, num_microbatches=num_microbatches)
  state, _ = step(state, _data())
  before = jax.device_get((state.params, state.opt_state))
  broken = _data()
  broken["y"] = broken["y"].at[5, 0].set(jnp.inf)
  for count in (1, 2):
    state, metrics = step(state, broken)
    assert metrics["num_nonfinite"] == state.num_nonfinite == count
  jax.tree.map(
    np.testing.assert_array_equal, (state.params, state.opt_state), before
  )
  state, metrics = step(state, _data())
  assert metrics["num_nonfinite"] == state.num_nonfinite == 0
  assert (state.params["kernel"] != before[0]["kernel"]).any()


def test_the_state_is_donated():
  state, step = _start(_regression("token_mean"))
  new, _ = step(state, _data())
  assert state.params["kernel"].is_deleted()
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.opt_state))
  assert not new.params["kernel"].is_deleted()


def _model(family, mesh):
  layout = sharding.of_activations(mesh)
  return tiny.build(family, **_SHAPE, **_OF_FAMILY[family], layout=layout)


def _sft_state(mesh, model):
  params = jax.device_put(
    tiny.params_of(model), sharding.of_params(mesh, model.abstract_params)
  )
  return train_state.create(params, _optimizer(), mesh=mesh)


def _sft_batch(model, seed, num_tokens=16):
  """Returns rows of two segments, followed by padding."""
  tokens, _, _ = tiny.batch(model, 8, num_tokens, seed=seed)
  lengths = [num_tokens - 9, 6, 3]
  segments = np.repeat([1, 2, 0], lengths)
  positions = np.concatenate([np.arange(n) for n in lengths])
  mask = jax.random.bernoulli(jax.random.key(seed), 0.6, tokens.shape)
  return {
    "token_ids": tokens,
    "positions": jnp.broadcast_to(positions, tokens.shape).astype(jnp.int32),
    "segment_ids": jnp.broadcast_to(segments, tokens.shape),
    "loss_mask": mask & (segments > 0) & (positions > 0),
  }


def _ten_steps(family, mesh, *, num_microbatches):
  model = _model(family, mesh)
  state = _sft_state(mesh, model)
  step = optimizer_step.make_step(
    functools.partial(
      sft.packed_loss,
      model,
      z_loss_coef=1e-4,
      chunk_tokens=4,
      router_aux_coef=0.0,
    ),
    _optimizer(),
    frozen={},
    shardings=train_state.shardings(state),
  )
  losses = []
  for seed in range(10):
    batch = jax.device_put(_sft_batch(model, seed), sharding.of_batch(mesh))
    state, metrics = step(state, batch, num_microbatches=num_microbatches)
    losses.append(float(metrics["loss"]))
  return state, losses, step


@functools.cache
def _ten_steps_of_one(family):
  state, losses, _ = _ten_steps(family, tiny.mesh(), num_microbatches=1)
  return state, losses


def _distance(left, right):
  """Returns the largest relative difference between arrays of two trees."""
  distances = jax.tree.map(
    lambda a, b: np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b),
    jax.device_get(left),
    jax.device_get(right),
  )
  return max(jax.tree.leaves(distances))


_MESHES = [
  ("qwen2", {"fsdp": 8}),
  ("qwen2", {"data": 4, "tensor": 2}),
  ("qwen2", {"context": 8}),
  ("gemma2", {"fsdp": 2, "context": 2, "tensor": 2}),
  ("qwen3_moe", {"data": 2, "expert": 4}),
  ("qwen3_moe", {"expert": 2, "context": 2, "tensor": 2}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "sizes"), _MESHES, ids=str)
def test_eight_devices_match_one(family, sizes):
  one, one_losses = _ten_steps_of_one(family)
  mesh = tiny.mesh(**sizes)
  parts = 1 if sharding.num_row_shards(mesh) == 8 else 2
  eight, eight_losses, step = _ten_steps(family, mesh, num_microbatches=parts)
  np.testing.assert_allclose(eight_losses, one_losses, rtol=1e-6)
  # Norms are compared: Adam divides by small moments, so single elements
  # differ more.
  assert _distance(eight.params, one.params) <= 1e-6
  assert _distance(eight.opt_state, one.opt_state) <= 1e-5
  # The state's shardings do not change, so only one program is compiled.
  start = train_state.shardings(_sft_state(mesh, _model(family, mesh)))
  assert train_state.shardings(eight) == start
  assert step.func._cache_size() == 1


def test_moments_are_sharded_as_their_parameters():
  mesh = tiny.mesh(data=2, fsdp=2, tensor=2)
  model = _model("qwen2", mesh)
  state = _sft_state(mesh, model)
  adam = state.opt_state[1]
  for moment in (adam.mu, adam.nu):
    assert train_state.shardings(moment) == train_state.shardings(state.params)


def test_no_device_holds_activations_of_other_devices_rows():
  mesh = tiny.mesh(fsdp=8)
  rows = sharding.of_batch(mesh)
  num_tokens = 13  # No other axis has this size, or the 8 of the rows.
  layout = sharding.of_activations(mesh)
  model = tiny.build("qwen2", **_SHAPE, head_dim=4, layout=layout)
  state = _sft_state(mesh, model)
  step = optimizer_step.make_step(
    functools.partial(
      sft.packed_loss,
      model,
      z_loss_coef=1e-4,
      chunk_tokens=100,
      router_aux_coef=0.0,
    ),
    _optimizer(),
    frozen={},
    shardings=train_state.shardings(state),
  )
  batch = jax.eval_shape(lambda: _sft_batch(model, 0, num_tokens=num_tokens))
  batch = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch
  )
  program = step.func.lower({}, state, batch).compile().as_text()
  shapes = set(re.findall(r"\b(?:f32|pred)\[([\d,]+)\]", program))
  assert f"1,{num_tokens},24" in shapes
  # Arrays of all rows hold at most an eighth of the width per device.
  of_all_rows = re.compile(rf"\b(8,{num_tokens}|{8 * num_tokens})\b")
  sizes = {
    shape: math.prod(map(int, shape.split(",")))
    for shape in shapes
    if of_all_rows.search(shape)
  }
  assert all(size <= num_tokens * 24 for size in sizes.values()), sizes
