# SPDX-License-Identifier: Apache-2.0
"""Offloaded state stays in host memory, and results do not change."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from atlas_jax import checkpoint, errors, sharding
from atlas_jax.train import optimizer as train_optimizer
from atlas_jax.train import optimizer_step, train_state
from configs import optimizer as optimizers

_ROWS, _WIDTH = 16, 8
_SPECS = {"kernel": ("fsdp", "tensor"), "scale": ()}
_OPTIMIZER = train_state.Offload(optimizer=True)
_BOTH = train_state.Offload(optimizer=True, reference=True)


def _mesh():
  return sharding.make_mesh(data=2, fsdp=2, tensor=2)


def _optimizer():
  return train_optimizer.make_optimizer(
    lambda _: 0.05, **optimizers.get_config()
  )


def _loss(params, batch):
  error = batch["x"] @ params["kernel"] * params["scale"] - batch["y"]
  loss = jnp.mean(jnp.square(error))
  return loss, (jnp.float32(1.0), {"loss": loss})


def _params():
  values = {
    "kernel": jax.random.normal(jax.random.key(0), (_WIDTH, _WIDTH)),
    "scale": jnp.ones(_WIDTH),
  }
  specs = {k: jax.sharding.PartitionSpec(*axes) for k, axes in _SPECS.items()}
  return {
    name: jax.device_put(value, jax.NamedSharding(_mesh(), specs[name]))
    for name, value in values.items()
  }


def _start(offload):
  return train_state.create(
    _params(),
    _optimizer(),
    mesh=_mesh(),
    reference=_params(),
    offload=offload,
  )


@functools.cache
def _make_step(offload):
  return optimizer_step.make_step(
    _loss,
    _optimizer(),
    frozen={},
    shardings=train_state.shardings(_start(offload)),
  )


def _train(state, step, steps):
  for seed in steps:
    keys = jax.random.split(jax.random.key(seed + 1))
    shape = (_ROWS, _WIDTH)
    batch = {
      n: jax.random.normal(k, shape) for n, k in zip("xy", keys, strict=True)
    }
    batch = jax.device_put(batch, sharding.of_batch(_mesh()))
    state, _ = step(state, batch, num_microbatches=2)
  return state


def _kinds(tree):
  return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


def _assert_same(left, right):
  jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize(
  ("offload", "moments", "reference"),
  [
    (train_state.Offload(), "device", "device"),
    (_OPTIMIZER, "pinned_host", "device"),
    (train_state.Offload(reference=True), "device", "pinned_host"),
    (_BOTH, "pinned_host", "pinned_host"),
  ],
)
def test_offloaded_state_stays_in_host_memory(offload, moments, reference):
  start = _start(offload)
  step = _make_step(offload)
  for state in (start, _train(_start(offload), step, range(3))):
    adam = state.opt_state[1]
    assert _kinds((adam.mu, adam.nu)) == {moments}
    assert _kinds(state.reference) == {reference}
    assert _kinds((state.params, state.step, adam.count)) == {"device"}
    assert train_state.shardings(state) == train_state.shardings(start)
  assert step.func._cache_size() == 1


def test_offloading_is_bitwise_equal():
  states = [
    _train(_start(offload), _make_step(offload), range(4))
    for offload in (train_state.Offload(), _BOTH)
  ]
  _assert_same(*states)


def test_a_skipped_update_does_not_change_offloaded_moments():
  step = _make_step(_BOTH)
  state = _train(_start(_BOTH), step, range(2))
  before = jax.device_get(state.opt_state)
  broken = {
    "x": jnp.full((_ROWS, _WIDTH), jnp.nan),
    "y": jnp.ones((_ROWS, _WIDTH)),
  }
  state, _ = step(state, jax.device_put(broken, sharding.of_batch(_mesh())))
  assert int(state.num_nonfinite) == 1
  _assert_same(state.opt_state, before)


@pytest.mark.parametrize("saved", [train_state.Offload(), _BOTH])
@pytest.mark.parametrize("resumed", [train_state.Offload(), _BOTH])
def test_a_checkpoint_is_restored_into_the_configured_memory(
  tmp_path, saved, resumed
):
  checkpointer = checkpoint.Checkpointer(
    tmp_path,
    identity={},
    keep=1,
    max_failed=1,
    allow_changed="",
    best_metric="",
    best_mode="min",
    load_best=False,
  )
  state = _train(_start(saved), _make_step(saved), range(2))
  checkpointer.save(2, state, {}, {})
  checkpointer.wait()
  restored, _ = checkpointer.restore_latest(_start(resumed))
  assert train_state.shardings(restored) == train_state.shardings(
    _start(resumed)
  )
  _assert_same(restored, state)
  straight = _train(state, _make_step(saved), (2, 3))
  _assert_same(_train(restored, _make_step(resumed), (2, 3)), straight)


def test_another_optimizer_resets_its_state_and_keeps_parameters(tmp_path):
  def open_saver(optimizer):
    return checkpoint.Checkpointer(
      tmp_path,
      identity={"optimizer": optimizer},
      keep=1,
      max_failed=1,
      allow_changed="optimizer",
      best_metric="",
      best_mode="min",
      load_best=False,
    )

  off = train_state.Offload()
  state = _train(_start(off), _make_step(off), range(2))
  with open_saver("adamw") as checkpointer:
    checkpointer.save(2, state, {}, {})
  other = train_state.create(
    _params(), optax.lion(1e-3), mesh=_mesh(), reference=_params()
  )
  restored, _ = open_saver("lion").restore_latest(other)
  _assert_same(restored.params, state.params)
  _assert_same(restored.opt_state, other.opt_state)
  assert int(restored.step) == int(state.step)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_transfer_moments_before_using_them(platform):
  """Checked in the lowered program, which needs no accelerator."""
  batch = {n: jnp.ones((_ROWS, _WIDTH)) for n in "xy"}
  traced = _make_step(_OPTIMIZER).func.trace({}, _start(_OPTIMIZER), batch)
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  main = text[text.index("@main") :].partition("func.func")[0]
  lines = main.splitlines()
  # The arguments, then the results.
  before, _, after = lines[0].partition("->")
  on_host = re.findall(r'%(arg\d+): [^%]*mhlo.memory_kind = "pinned_', before)
  num_moments = 2 * len(_params())
  assert len(on_host) == after.count('kind = "pinned_host"') == num_moments
  for name in on_host:
    uses = [line for line in lines[1:] if re.search(rf"%{name}\b", line)]
    assert len(uses) == 1
    assert '_xla_buffer_placement = "device"' in uses[0]


def test_devices_without_host_memory_are_rejected(monkeypatch):
  monkeypatch.setattr(train_state, "_HOST", "memory_of_nobody")
  with pytest.raises(errors.ConfigError, match="Offloading needs") as caught:
    _start(_BOTH)
  assert caught.value.exit_code == errors.Exit.CONFIG
  assert "pinned_host" in caught.value.why
  _start(train_state.Offload())


def test_offloading_a_missing_reference_is_rejected():
  with pytest.raises(errors.ConfigError, match="stores no reference"):
    train_state.create(_params(), _optimizer(), mesh=_mesh(), offload=_BOTH)
