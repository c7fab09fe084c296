# SPDX-License-Identifier: Apache-2.0
"""One update of each optimizer against its paper; rounding; frozen parameters.

The tests of rounding train bfloat16 parameters, and compare with float32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from atlas_jax import checkpoint, errors, sharding
from atlas_jax.train import optimizer, optimizer_step, train_state
from configs import optimizer as optimizers
from tests import tiny

_NAMES = ("adamw", "lion", "adafactor", "muon")


def _make(rate=0.01, **changes):
  config = optimizers.get_config()
  config.update_from_flattened_dict(changes)
  return optimizer.make_optimizer(lambda _: rate, **config)


def _params():
  values = {"kernel": [1.0, -2.0], "scale": [3.0, 4.0], "bias": [0.5, 0.5]}
  return {"layers": {name: jnp.array(value) for name, value in values.items()}}


def _one_update(chain, params, grads):
  # Without jit, every operation is compiled for every shape.
  update = jax.jit(functools.partial(chain.update, step=0))
  updates, _ = update(grads, jax.jit(chain.init)(params), params)
  return updates


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
def test_one_update_is_the_papers_with_clipping_and_masked_decay(name):
  params = _params()
  grads = jax.tree.map(lambda x: 10.0 * x, params)
  chain = _make(name=name, weight_decay=0.1)
  updates = _one_update(chain, params, grads)
  for path, value in params["layers"].items():
    # After one update Adam's bias-corrected moments are the gradient and its
    # square, and Adafactor's unfactored moment is its square. So all three
    # directions are the gradient's sign; clipping matters only relative to
    # epsilon.
    decay = 0.1 if path == "kernel" else 0.0
    expected = -0.01 * (np.sign(value) + decay * np.asarray(value))
    np.testing.assert_allclose(updates["layers"][path], expected, rtol=1e-5)


@pytest.mark.parametrize(
  ("max_grad_norm", "norm"), [(1.0, 1.0), (30.0, 20.0), (0.0, 20.0)]
)
def test_the_global_norm_is_clipped_if_it_is_greater(max_grad_norm, norm):
  # With a large epsilon Adam's update is proportional to the gradient.
  chain = _make(1.0, **{"max_grad_norm": max_grad_norm, "adamw.epsilon": 1e6})
  params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
  grads = {"a": jnp.array([12.0]), "b": jnp.array([-16.0])}
  updates = _one_update(chain, params, grads)
  found = 1e6 * np.hypot(updates["a"], updates["b"])
  np.testing.assert_allclose(found, norm, rtol=1e-4)


def test_lions_momentum_lags_behind_its_updates():
  chain = _make(1.0, **{"name": "lion", "max_grad_norm": 0.0})
  params = {"kernel": jnp.zeros(1)}
  state = chain.init(params)
  momentum = 0.0
  for grad in (1.0, -0.05, -0.3, 0.02):
    grads = {"kernel": jnp.array([grad])}
    updates, state = chain.update(grads, state, params, step=0)
    assert updates["kernel"] == -np.sign(0.9 * momentum + 0.1 * grad)
    momentum = 0.99 * momentum + 0.01 * grad


def test_the_rate_depends_on_the_step_not_on_the_number_of_updates():
  config = optimizers.get_config()
  config.update(name="lion", max_grad_norm=0.0)
  chain = optimizer.make_optimizer(lambda step: 0.25 * step, **config)
  params = {"kernel": jnp.ones(1)}
  state = chain.init(params)
  for step in (0, 3, 4, 8):
    updates, state = chain.update(params, state, params, step=step)
    assert updates["kernel"] == -0.25 * step


def test_stochastic_rounding_is_unbiased_and_between_the_neighbors():
  # Between 1 and 1 + 1/128, across a power of two, negative, and tiny.
  values = np.array([1.0 + 1 / 1024, 2.0 - 1 / 1024, -3.01, 1e-20], np.float32)
  values = np.broadcast_to(values, (20000, 4))
  rounded = np.asarray(
    optimizer.round_stochastically(jax.random.key(0), values)
  )
  np.testing.assert_array_equal(
    rounded, rounded.astype(jnp.bfloat16).astype(np.float32)
  )
  gaps = 2.0 ** (np.floor(np.log2(np.abs(values))) - 7)
  assert (np.abs(rounded - values) < gaps).all()
  errors_4 = np.mean((rounded - values) / gaps, axis=0, dtype=np.float64)
  assert np.abs(errors_4).max() < 4 * 0.5 / np.sqrt(20000)


def test_stochastic_rounding_keeps_values_that_need_none():
  values = jnp.array([0.0, -0.0, 1.0, -1.5, 3e38, jnp.inf], jnp.bfloat16)
  for seed in range(5):
    rounded = optimizer.round_stochastically(
      jax.random.key(seed), values.astype(jnp.float32)
    )
    np.testing.assert_array_equal(rounded, values.astype(jnp.float32))


_NUM, _STEPS = 4096, 100


def _descent(dtype, rounding):
  """Minimizes |w - target|^2 from starts in [1, 2), at a distance of 0.1.

  There, numbers in bfloat16 are 1/128 apart, and an update is about 1/1000.
  Returns the starts, the final state and the losses.
  """
  chain = _make(1e-3, rounding=rounding)
  start = jax.random.uniform(
    jax.random.key(0), _NUM, jnp.bfloat16, minval=1.0, maxval=2.0
  ).astype(jnp.float32)

  def loss_fn(params, batch):
    gaps = params["w"].astype(jnp.float32) - (start + 0.1)
    loss = batch["weight"][0] * jnp.mean(jnp.square(gaps))
    return loss, (jnp.float32(1.0), {"loss": loss})

  mesh = tiny.mesh()
  params = {"w": jax.device_put(start.astype(dtype), sharding.replicated(mesh))}
  params = jax.tree.map(jnp.copy, params)  # They are donated.
  state = train_state.create(params, chain, mesh=mesh)
  step = optimizer_step.make_step(
    loss_fn, chain, frozen={}, shardings=train_state.shardings(state)
  )
  losses = []
  for _ in range(_STEPS):
    state, metrics = step(state, {"weight": jnp.ones(2)}, num_microbatches=2)
    state = state._replace(step=state.step + 1)
    losses.append(float(metrics["loss"]))
  return np.asarray(start), state, losses


def test_stochastic_rounding_trains_like_float32():
  start, full, losses = _descent(jnp.float32, "nearest")
  _, low, low_losses = _descent(jnp.bfloat16, "stochastic")
  assert low.params["w"].dtype == jnp.bfloat16
  assert low.opt_state[1].mu["w"].dtype == jnp.float32
  moved, low_moved = (
    np.asarray(state.params["w"].astype(jnp.float32)) - start
    for state in (full, low)
  )
  # Each step adds an error of variance below |update| / 128.
  deviation = np.sqrt(_STEPS * 1e-3 / 128)
  assert moved.mean() > 0.07
  assert abs(low_moved.mean() - moved.mean()) < 4 * deviation / np.sqrt(_NUM)
  assert low_moved.std() < deviation
  # The loss differs by the mean square of these errors.
  assert losses[-1] < 0.1 * losses[0]
  assert abs(low_losses[-1] - losses[-1]) < deviation**2
  # Rounded to the nearest, no parameter would ever move.
  nearest = jnp.asarray(start + 1e-3).astype(jnp.bfloat16)
  np.testing.assert_array_equal(nearest.astype(jnp.float32), start)


def _spread(params, mesh, axes):
  place = jax.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
  return jax.device_put(params, place)


def test_random_bits_depend_on_the_count_only():
  chain = _make(1e-3, rounding="stochastic")
  update = jax.jit(chain.update)

  def run(counts, mesh, axes, state=None, params=None):
    params = params or {
      name: jnp.full((16, 16), value, jnp.bfloat16)
      for name, value in (("a", 1.0), ("b", 1.0))
    }
    params = _spread(params, mesh, axes)
    state = state or chain.init(params)
    for _ in counts:
      updates, state = update(params, state, params, step=0)
      params = optax.apply_updates(params, updates)
    return params, state

  one, _ = run(range(4), tiny.mesh(), ())
  eight, _ = run(range(4), tiny.mesh(fsdp=4, tensor=2), ("fsdp", "tensor"))
  assert _bits(one) == _bits(eight)
  assert _bits(one["a"]) != _bits(one["b"])
  params, state = run(range(2), tiny.mesh(), ())
  resumed, _ = run(range(2), tiny.mesh(), (), state, params)
  assert _bits(resumed) == _bits(one)


@pytest.mark.parametrize(
  ("dtype", "rounding", "message"),
  [
    ("bfloat16", "nearest", "param_dtype=bfloat16"),
    ("float32", "stochastic", "requires trained parameters in bfloat16"),
    ("float32", "up", "nearest, stochastic"),
  ],
)
def test_a_rounding_that_does_not_suit_the_parameters_is_rejected(
  dtype, rounding, message
):
  params = {"a": jnp.ones(2, dtype)}
  with pytest.raises(errors.ConfigError, match=message):
    _make(rounding=rounding).init(params)
  # Frozen parameters may be in any dtype.
  frozen = {**params, "b": jnp.ones(2)}
  _make(frozen=("a",)).init(frozen)


def _model():
  model = tiny.build("qwen2")
  return tiny.params_of(model), tiny.params_of(model, seed=1)


def _by_layer(params, layer):
  """Selects one layer of the stack."""
  layers = jax.tree.map(lambda x: x[layer : layer + 1], params["layers"])
  return {**params, "layers": layers}


def test_muon_makes_each_layers_matrices_orthogonal():
  params, grads = _model()
  chain = _make(1.0, name="muon", max_grad_norm=0.0)
  updates = _one_update(chain, params, grads)
  attention, mlp = updates["layers"]["attention"], updates["layers"]["mlp"]
  for layer in range(2):
    q_DNH, o_NHD = (attention[name]["kernel"][layer] for name in "qo")
    width = q_DNH.shape[0]
    matrices = [q_DNH.reshape(width, -1), o_NHD.reshape(-1, width)]
    matrices += [mlp[name]["kernel"][layer] for name in ("gate", "up", "down")]
    for matrix in matrices:
      singular = np.linalg.svd(matrix, compute_uv=False)
      scaled = singular / (0.2 * np.sqrt(max(matrix.shape)))
      # Newton-Schulz converges near one, not to it.
      assert (scaled > 0.5).all()
      assert (scaled < 1.3).all()
    alone = _one_update(
      chain, _by_layer(params, layer), _by_layer(grads, layer)
    )
    np.testing.assert_allclose(
      alone["layers"]["mlp"]["up"]["kernel"][0],
      mlp["up"]["kernel"][layer],
      atol=1e-5,
    )


def test_muon_leaves_the_rest_to_adam():
  params, grads = _model()
  updates, expected = (
    _one_update(_make(name=name, max_grad_norm=0.0), params, grads)
    for name in ("muon", "adamw")
  )
  for path in ("embed", "head", "final_norm"):
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-5),
      updates[path],
      expected[path],
    )
  biases = (
    tree["layers"]["attention"]["q"]["bias"] for tree in (updates, expected)
  )
  np.testing.assert_allclose(*biases, rtol=1e-5)


def test_adafactor_stores_a_row_and_a_column():
  params = {"kernel": jnp.ones((128, 256))}
  state = _make(name="adafactor").init(params)
  assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 128 + 256 + 9


@pytest.mark.parametrize("name", _NAMES)
def test_frozen_parameters_are_unchanged_and_have_no_state(name):
  params, grads = _model()
  frozen = ("embed/.*", "layers/mlp/(up|down)/kernel")
  free, partly = (
    _make(name=name, frozen=f, weight_decay=0.1) for f in ((), frozen)
  )
  updates = _one_update(partly, params, grads)
  assert not updates["embed"]["embedding"].any()
  assert not updates["layers"]["mlp"]["up"]["kernel"].any()
  assert updates["layers"]["mlp"]["gate"]["kernel"].all()
  sizes = [
    sum(leaf.size for leaf in jax.tree.leaves(chain.init(params)))
    for chain in (partly, free)
  ]
  assert sizes[0] < 0.8 * sizes[1]


def test_a_pattern_without_a_match_is_rejected():
  with pytest.raises(errors.ConfigError, match="embed/embeding") as caught:
    _make(frozen=("embed/embeding",)).init(_model()[0])
  assert "embed/embedding" in caught.value.why


def test_frozen_parameters_have_no_gradient_but_affect_the_loss():
  def loss(params, batch):
    return jnp.sum(params["a"] * params["b"]) * batch

  params = {"a": jnp.array(2.0), "b": jnp.array(3.0)}
  frozen = optimizer.freeze(loss, ("a",))
  assert frozen(params, 1.0) == 6.0
  assert jax.grad(frozen)(params, 1.0) == {"a": 0.0, "b": 2.0}


@pytest.mark.parametrize("name", ["adam", "adamw_8bit"])
def test_an_unknown_optimizer_is_rejected(name):
  with pytest.raises(errors.ConfigError, match="adamw, lion, adafactor, muon"):
    _make(name=name)


def _bits(tree):
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize(
  ("name", "dtype"),
  [
    ("adamw", "float32"),
    ("lion", "bfloat16"),
    ("adafactor", "bfloat16"),
    ("muon", "float32"),
  ],
)
def test_moments_are_sharded_and_resume_is_bitwise(name, dtype, tmp_path):
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  even = {
    "hidden_size": 24,
    "vocab_size": 36,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
  }
  model = tiny.build("qwen2", **even)
  shardings = sharding.of_params(mesh, model.abstract_params)
  rounding = "nearest" if dtype == "float32" else "stochastic"
  chain = _make(name=name, frozen=("embed/.*",), rounding=rounding)

  def start():
    params = optax.tree.cast(tiny.params_of(model), dtype)
    params = jax.device_put(params, shardings)
    return train_state.create(params, chain, mesh=mesh)

  def loss_fn(params, batch):
    leaves = jax.tree.leaves(params)
    loss = sum(jnp.sum(jnp.sin(batch["x"] * leaf)) for leaf in leaves)
    return loss, (jnp.float32(1.0), {"loss": loss})

  step = optimizer_step.make_step(
    optimizer.freeze(loss_fn, ("embed/.*",)),
    chain,
    frozen={},
    shardings=train_state.shardings(start()),
  )
  state = start()
  moments = [
    leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim == 4
  ]
  # Of the four attention kernels; Adam keeps two moments of each.
  assert len(moments) == (8 if name == "adamw" else 4)
  assert all(leaf.dtype == jnp.float32 for leaf in moments)
  assert all(len(leaf.sharding.device_set) == 8 for leaf in moments)
  assert not any(leaf.sharding.is_fully_replicated for leaf in moments)

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
  for i in range(4):
    if i == 2:
      checkpointer.save(2, state, {}, {})
      checkpointer.wait()
    state, _ = step(state, {"x": jnp.float32(1 + i)})
  resumed, _ = checkpointer.restore_latest(start())
  for i in (2, 3):
    resumed, _ = step(resumed, {"x": jnp.float32(1 + i)})
  assert _bits(resumed) == _bits(state)
