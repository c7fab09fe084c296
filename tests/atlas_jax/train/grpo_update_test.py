# SPDX-License-Identifier: Apache-2.0
"""Tests that updates do not depend on batch layout, for every loss."""

import functools
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from atlas_jax import errors, sharding, types
from atlas_jax.losses import kl, logprobs
from atlas_jax.models import decoder, lora
from atlas_jax.train import grpo_update, score, train_state, trainable
from configs.run import teacher_rcl
from tests import tiny

_LOSSES = ("rcl", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo")
_SIZE, _NUM_GROUPS = 4, 4
_SHAPE = {
  "hidden_size": 24,
  "vocab_size": 36,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "num_hidden_layers": 1,
}
_MODEL = tiny.build("qwen2", **_SHAPE)


class _Bigrams(decoder.Model):
  """Predicts from the last token only: its programs compile in less time."""

  def hidden_and_balance(self, params, tokens_BT, positions_BT, segment_ids_BT):
    """Returns the embeddings; without attention, layouts do not matter."""
    del positions_BT, segment_ids_BT
    return params["embed"]["embedding"][tokens_BT], jnp.zeros(())


# Losses and batches are tested on bigrams; the decoder shows that layouts and
# meshes do not change its own part either.
_MODELS = {
  "decoder": _MODEL,
  "bigrams": _Bigrams(
    **vars(_MODEL)
    | {
      "abstract_params": {
        name: _MODEL.abstract_params[name] for name in ("embed", "head")
      }
    }
  ),
}


def _config(loss, **changes):
  config = teacher_rcl.get_config(f"smoke,{loss}")
  config.sampling.teach.group_size = _SIZE
  config.logits.chunk_tokens = 8
  config.correction.max_ratio = 1e3
  config.correction.level = "sequence" if loss == "gspo" else "token"
  config.batch.mask_truncated = False
  config.packing = {"length": 0, "packed": False}
  config.batch.per_device = 0
  config.batch.num_questions = _NUM_GROUPS
  config.update_from_flattened_dict(changes)
  return ml_collections.FrozenConfigDict(config)


def _records(rng=None, most=9):
  """Returns records of 1 to `most` completion tokens, and distinct rewards."""
  rng = rng or np.random.default_rng(0)
  records, rewarded = [], []
  for i in range(_NUM_GROUPS * _SIZE):
    question = types.Question(f"q{i // _SIZE}", "?", "1")
    ids = tuple(rng.integers(3, 36, rng.integers(1, most + 1)).tolist())
    logprobs = tuple((-3.5 + 0.2 * rng.normal(size=len(ids))).tolist())
    completion = types.Completion(ids, logprobs, logprobs, "stop", 0)
    rollout = types.Rollout(types.Prompt("", "", (5, 6, 7)), completion)
    records.append(types.TeachingRecord(question, "", rollout, None, 0, (), ()))
    rewarded.append(types.Reward(float(rng.normal())))
  return records, rewarded


def _update(
  config, *, model="bigrams", mesh=None, optimizer=None, records=None
):
  """Takes one SGD step; returns gradient, metrics and new state."""
  model = _MODELS[model] if isinstance(model, str) else model
  mesh = mesh or tiny.mesh()
  optimizer = optimizer or optax.sgd(1.0)
  params, reference = (
    jax.device_put(
      tiny.params_of(model, seed),
      sharding.of_params(mesh, model.abstract_params),
    )
    for seed in range(2)
  )
  before = jax.device_get(params)
  state = train_state.create(
    params,
    optimizer,
    mesh=mesh,
    reference=reference if config.loss.kl_coef else None,
  )
  updater = grpo_update.GrpoUpdate(
    trainable.full_policy(model),
    optimizer,
    shardings=train_state.shardings(state),
    mesh=mesh,
    config=config,
  )
  state, metrics = updater.update(
    state, *(records or _records()), is_compared=False
  )
  moved = jax.tree.map(np.subtract, before, jax.device_get(state.params))
  return moved, metrics, state


def _distance(left, right):
  """Returns the largest relative L2 distance between leaves."""
  distances = jax.tree.map(
    lambda a, b: np.linalg.norm(a - b) / (np.linalg.norm(b) + 1e-8), left, right
  )
  return max(jax.tree.leaves(distances))


@functools.cache
def _whole(loss, model):
  """Returns the step with the whole batch in a single microbatch."""
  return _update(_config(loss), model=model)


_EACH_LOSS = pytest.mark.parametrize(
  ("loss", "model"),
  [*((loss, "bigrams") for loss in _LOSSES), ("rcl", "decoder")],
)

# Rows of up to five sequences; three of eight microbatches hold all 16.
_PACKED = {
  "packing.length": 32,
  "packing.packed": True,
  "batch.per_device": 2,
}


@_EACH_LOSS
def test_packing_does_not_change_the_update(loss, model):
  # SGD, since Adam would hide a constant factor in the gradient.
  whole, metrics, _ = _whole(loss, model)
  metrics = dict(metrics)
  assert metrics["grad_norm"] > 1e-4
  packed, packed_metrics, _ = _update(_config(loss, **_PACKED), model=model)
  assert packed_metrics.keys() == metrics.keys()
  paddings = [m.pop("padding_fraction") for m in (packed_metrics, metrics)]
  assert paddings[0] < paddings[1] / 2
  for name, value in packed_metrics.items():
    np.testing.assert_allclose(
      value, metrics[name], rtol=1e-5, atol=1e-6, err_msg=name
    )
  assert _distance(packed, whole) < 1e-5


@pytest.mark.parametrize(
  ("loss", "model"),
  [("grpo", "bigrams"), ("gspo", "bigrams"), ("rloo", "decoder")],
)
def test_packing_does_not_change_later_iterations(loss, model):
  # The reward of rloo includes the KL, which is scored in packed rows.
  changes = {
    "batch.num_iterations": 2,
    "batch.num_minibatches": 2,
    "loss.kl_coef": 0.05,
  }
  apart, metrics, _ = _update(_config(loss, **changes), model=model)
  packed, packed_metrics, _ = _update(
    _config(loss, **changes, **_PACKED), model=model
  )
  assert metrics["ratio_max"] > 1.001
  for name in ("loss", "kl", "ratio_max", "clip_low_fraction"):
    np.testing.assert_allclose(
      packed_metrics[name], metrics[name], rtol=1e-4, atol=1e-6
    )
  assert _distance(packed, apart) < 1e-4


@pytest.mark.slow
@_EACH_LOSS
def test_loss_and_gradient_do_not_depend_on_microbatches_or_mesh(loss, model):
  whole, metrics, _ = _whole(loss, model)
  assert metrics["grad_norm"] > 1e-4
  sizes = {"data": 2, "fsdp": 2, "tensor": 2}
  # Packed rows on one device are those of the test of packing above.
  for per_device, packing, mesh in [
    (4, {}, tiny.mesh()),
    (2, {}, tiny.mesh(**sizes)),
    (1, _PACKED, tiny.mesh(**sizes)),
  ]:
    config = _config(loss, **{**packing, "batch.per_device": per_device})
    split, split_metrics, _ = _update(config, model=model, mesh=mesh)
    for name in ("loss", "grad_norm"):
      np.testing.assert_allclose(
        split_metrics[name], metrics[name], rtol=1e-5, atol=1e-7
      )
    assert _distance(split, whole) < 1e-5


def test_router_aux_coef_scales_the_balance_loss():
  model = tiny.build("qwen3_moe", **_SHAPE)
  plain, before, _ = _update(_config("grpo"), model=model)
  config = _config("grpo", **{"experts.router_aux_coef": 0.5})
  moved, after, _ = _update(config, model=model)
  balance = before["router_aux_loss"]
  assert balance > 1.0
  np.testing.assert_allclose(
    after["loss"], before["loss"] + 0.5 * balance, rtol=1e-5
  )
  router = ("layers", "mixture", "router", "kernel")
  for key in router:
    plain, moved = plain[key], moved[key]
  assert np.abs(moved - plain).max() > 1e-3
  with pytest.raises(errors.ConfigError, match="without experts"):
    _update(config)


@_EACH_LOSS
def test_every_loss_updates_the_policy(loss, model):
  moved, metrics, _ = _whole(loss, model)
  assert np.isfinite(metrics["loss"])
  assert metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-5)
  has_reference = _config(loss).loss.kl_coef > 0
  assert {"kl", "kl_old"} & metrics.keys() == (
    {"kl"} if has_reference else {"kl_old"}
  )
  assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(moved)) > 1e-6


def test_later_iterations_are_off_policy_and_padding_is_never_an_update():
  config = _config(
    "grpo", **{"batch.num_iterations": 2, "batch.num_minibatches": 2}
  )
  optimizer = optax.adam(1e-2)
  _, metrics, state = _update(config, optimizer=optimizer)
  assert metrics["ratio_max"] > 1.001
  assert optax.tree.get(state, "count") == 4

  # Two trained rows in four minibatches: two of them are only padding.
  records, rewarded = _records()
  rewarded = [*rewarded[:2], *[types.Reward(None)] * (len(rewarded) - 2)]
  records = [records, rewarded]
  config = _config("grpo", **{"batch.num_minibatches": 4})
  *_, state = _update(config, optimizer=optimizer, records=records)
  assert optax.tree.get(state, "count") == 2


@pytest.mark.parametrize(
  ("loss", "model"),
  [("rcl", "decoder"), ("gspo", "bigrams")],
)
def test_a_single_update_computes_its_own_old_logprobs(
  loss, model, monkeypatch
):
  config, plain = _config(loss), grpo_update.GrpoUpdate._scored

  def scored(updater, state, part):
    part = plain(updater, state, part)
    completions = part.batch["completions"]
    assert "old_logprobs" not in completions
    completions["old_logprobs"] = updater._programs.score(
      state.params, part.batch, part.num_used, part.num_microbatches
    )
    return part

  alone, metrics, _ = _update(config, model=model)
  monkeypatch.setattr(grpo_update.GrpoUpdate, "_scored", scored)
  apart, expected, _ = _update(config, model=model)
  assert _distance(alone, apart) < 1e-5
  assert metrics.keys() == expected.keys()
  for name, value in metrics.items():
    np.testing.assert_allclose(
      value, expected[name], rtol=1e-5, atol=1e-6, err_msg=name
    )


def _inflate_ratio(monkeypatch):
  """Inflates the ratio of the policy to the old policy by e^50."""
  plain = grpo_update.GrpoUpdate._scored

  def scored(updater, state, part):
    part = plain(updater, state, part)
    part.batch["completions"]["old_logprobs"] -= 50.0
    return part

  monkeypatch.setattr(grpo_update.GrpoUpdate, "_scored", scored)


def test_an_exploding_ratio_is_clipped_and_raises_an_alarm(monkeypatch):
  warnings = []
  monkeypatch.setattr(
    logging, "warning", lambda text, *args: warnings.append(text % args)
  )
  changes = {"batch.num_minibatches": 2, "loss.max_ratio": 5.0}
  _inflate_ratio(monkeypatch)
  moved, metrics, _ = _update(_config("grpo", **changes))
  assert metrics["ratio_max"] > 1e21
  # Both bounds clip the ratio, so loss and gradient stay finite.
  assert abs(metrics["loss"]) < 10.0
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(moved))
  (logged,) = (line for line in warnings if line.startswith("ALARM"))
  assert "at step 1: ratio_max is " in logged
  with pytest.raises(errors.DivergedError, match="ratio_max"):
    _update(_config("grpo", **changes, **{"alarm.stop": True}))


def test_filter_equal_drops_groups_of_equal_rewards():
  records, rewarded = _records()
  rewarded[:_SIZE] = [types.Reward(0.5)] * _SIZE
  num_tokens = [
    _update(
      _config("grpo", **{"groups.filter_equal": filter_equal}),
      records=(records, rewarded),
    )[1]["num_tokens"]
    for filter_equal in (True, False)
  ]
  lengths = [3 + len(r.teacher_rollout.completion.token_ids) for r in records]
  assert num_tokens == [sum(lengths[_SIZE:]), sum(lengths)]


def test_kl_in_the_reward_changes_the_advantage():
  config = _config("rloo", **{"loss.kl_coef": 0.5})
  mesh = tiny.mesh()
  params, reference = (tiny.params_of(_MODEL, seed) for seed in range(2))
  state = train_state.create(
    params, optax.sgd(1.0), mesh=mesh, reference=reference
  )
  updater = grpo_update.GrpoUpdate(
    trainable.full_policy(_MODEL),
    optax.sgd(1.0),
    shardings=train_state.shardings(state),
    mesh=mesh,
    config=config,
  )
  records, rewarded = _records()
  rewarded[5] = types.Reward(None)
  rewards_PC, valid_PC = grpo_update.group_rewards(rewarded, _SIZE)
  keep = updater._kept(records, rewards_PC, valid_PC)
  assert keep == [i for i in range(len(records)) if i != 5]
  (part,) = updater._pack([records[i].teacher_rollout for i in keep])
  part = updater._scored(state, part)
  updater._add_advantages([part], keep, rewards_PC, valid_PC)

  completions = part.batch["completions"]
  penalty_B = kl.of_sequences(
    completions["old_logprobs"],
    completions["ref_logprobs"],
    completions["places"] >= 0,
    estimator="k1",
  )[: len(keep)]
  advantages_B = completions["advantages"][: len(keep)]
  total_B = np.full(len(records), np.nan)
  total_B[keep] = [rewarded[i].value for i in keep]
  total_B[keep] -= 0.5 * np.asarray(penalty_B)
  for i, advantage in zip(keep, advantages_B, strict=True):
    group = i // _SIZE
    others = [
      total_B[j]
      for j in range(group * _SIZE, (group + 1) * _SIZE)
      if j not in (i, 5)
    ]
    np.testing.assert_allclose(
      advantage, total_B[i] - np.mean(others), atol=1e-5
    )
  assert not completions["advantages"][len(keep) :].any()


def test_adapters_use_their_base_as_reference_without_a_copy():
  changes = {"loss.kl_coef": 0.1, "batch.num_iterations": 2}
  mesh, config = tiny.mesh(), _config("grpo", **changes)
  policy, adapters = trainable.create(
    _MODEL,
    tiny.params_of(_MODEL),
    adapters=lora.Lora(rank=2, alpha=4.0, targets=("mlp/.*",)),
    mesh=mesh,
    key=jax.random.key(0),
  )
  adapters = jax.tree.map(lambda x: x + 0.1, adapters)
  switched = train_state.create(adapters, optax.sgd(1.0), mesh=mesh)
  copied = train_state.create(
    tiny.params_of(_MODEL),
    optax.sgd(1.0),
    mesh=mesh,
    reference=tiny.params_of(_MODEL),
  )
  assert len(jax.tree.leaves(switched)) == 2 + len(jax.tree.leaves(adapters))

  scores = []
  for of, state in (
    (policy, switched),
    (trainable.full_policy(_MODEL), copied),
  ):
    updater = grpo_update.GrpoUpdate(
      of,
      optax.sgd(1.0),
      shardings=train_state.shardings(state),
      mesh=mesh,
      config=config,
    )
    rollouts = [record.teacher_rollout for record in _records()[0]]
    (part,) = updater._pack(rollouts)
    scores.append(updater._scored(state, part).batch["completions"])
  np.testing.assert_array_equal(
    scores[0]["ref_logprobs"], scores[1]["ref_logprobs"]
  )
  moved_BT = scores[0]["old_logprobs"] - scores[1]["old_logprobs"]
  assert np.abs(moved_BT).max() > 1e-2


def test_syncing_a_bfloat16_reference_rounds_the_mean_once():
  config = _config("grpo", **{"reference.sync_every": 1, "reference.mix": 0.6})
  params = tiny.params_of(_MODEL)
  reference = train_state.copied(tiny.params_of(_MODEL, 1), "bfloat16")
  state = train_state.create(
    params, optax.sgd(1.0), mesh=tiny.mesh(), reference=reference
  )
  updater = grpo_update.GrpoUpdate(
    trainable.full_policy(_MODEL),
    optax.sgd(1.0),
    shardings=train_state.shardings(state),
    mesh=tiny.mesh(),
    config=config,
  )
  synced = updater._sync_reference(state).reference

  def check(found, old, new):
    mean = 0.4 * old.astype(jnp.float32) + 0.6 * new
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, mean.astype(jnp.bfloat16))

  jax.tree.map(check, synced, reference, params)


@pytest.mark.parametrize(
  ("activations", "bound"), [("bfloat16", 0.0), ("float32", 1e-3)]
)
def test_a_bfloat16_reference_changes_the_kl_little(activations, bound):
  model = tiny.build("qwen2", **_SHAPE, dtype=activations)
  params = tiny.params_of(model)
  tokens = tiny.batch(model, 2, 16)
  logits_fn = jax.jit(model.logits)
  logprobs_BTV, low_BTV = (
    jax.nn.log_softmax(logits_fn(train_state.copied(params, dtype), *tokens))
    for dtype in ("", "bfloat16")
  )
  gaps_BTV = logprobs_BTV - low_BTV
  kl_BT = jnp.sum(jnp.exp(logprobs_BTV) * gaps_BTV, axis=-1)
  assert jnp.abs(kl_BT).max() <= bound
  # Kernels are cast to the activations' dtype where they are used.
  assert (jnp.abs(gaps_BTV).max() == 0.0) == (activations == "bfloat16")


def test_rewards_must_form_whole_groups():
  with pytest.raises(ValueError, match="do not form whole groups of 4"):
    grpo_update.group_rewards([types.Reward(1.0)] * 6, 4)


def _trivial_stats(model, params, batch, **settings):
  """Stands for the decoder, which takes seconds to compile."""
  del model, settings
  logprobs_BT = jnp.sin(batch["token_ids"][:, 1:] * params["weight"])
  stats = logprobs.TokenStats(*[logprobs_BT] * 4)
  return stats, jnp.zeros(())


def test_random_lengths_compile_no_more_programs_than_the_menu(monkeypatch):
  monkeypatch.setattr(score, "token_stats_and_balance", _trivial_stats)
  config = _config(
    "grpo",
    **{
      "loss.kl_coef": 0.1,
      "batch.num_iterations": 2,
      "batch.num_minibatches": 2,
      "batch.per_device": 2,
      "packing.packed": True,
      "sampling.teach.max_completion_tokens": 100,
      "agreement.max_prob_error": 1e9,
    },
  )
  mesh = tiny.mesh(fsdp=2)

  def params():  # New arrays at every call, since updates donate them.
    return {"weight": jax.device_put(0.1, sharding.replicated(mesh))}

  state = train_state.create(
    params(), optax.sgd(0.1), mesh=mesh, reference=params()
  )
  updater = grpo_update.GrpoUpdate(
    trainable.full_policy(_MODEL),
    optax.sgd(0.1),
    shardings=train_state.shardings(state),
    mesh=mesh,
    config=config,
  )
  rng = np.random.default_rng(0)
  shapes = updater._pack.keywords["layout"].menu
  assert [shape.length for shape in shapes] == [32, 64, 128]
  for most in (5, 25, 50, 90, 5, 25, 50, 90):
    records, rewarded = _records(rng, most)
    state, metrics = updater.update(state, records, rewarded, is_compared=False)
    assert np.isfinite(metrics["loss"])
  programs: Any = updater._programs  # Any: `_cache_size` is not public.
  for program in (programs.step.func, programs.score, programs.score_reference):
    assert program._cache_size() == len(shapes)
