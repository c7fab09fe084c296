# SPDX-License-Identifier: Apache-2.0
"""Tests which records an update uses, and how it syncs the reference."""

import functools

import jax
import numpy as np
import pytest

from atlas_jax import types
from atlas_jax.train import grpo, grpo_update, train_state, trainable
from atlas_jax.train import optimizer as train_optimizer
from configs.run import teacher_rcl
from tests import tiny

_QUESTIONS = [
  types.Question(f"q{i}", f"{i} + {i}?", str(2 * i)) for i in (0, 1)
]
_SYNC_EVERY, _MIX = 3, 0.25
_MODEL = tiny.build("qwen2", vocab_size=64, num_hidden_layers=1)


def _config(**changes):
  config = teacher_rcl.get_config("smoke,grpo")
  config.loss.kl_coef = 0.01
  config.groups.filter_equal = True
  config.batch.mask_truncated = False
  config.packing = {"length": 0, "packed": False}
  config.reference = {"sync_every": _SYNC_EVERY, "mix": _MIX}
  config.update_from_flattened_dict(changes)
  return config


def _optimizer():
  return train_optimizer.make_optimizer(lambda _: 0.01, **_config().optimizer)


def _record(question, index, *, token=20, finish_reason="stop"):
  ids = tuple(range(token, token + 4 + index))
  completion = types.Completion(
    token_ids=ids,
    logprobs=(-5.0,) * len(ids),
    model_logprobs=(-5.0,) * len(ids),
    finish_reason=finish_reason,
    version=0,
  )
  prompt = types.Prompt(question.row_id, "", (10, 11, 12))
  attempt = types.Attempt("4", 1, "stop", correct=True)
  return types.TeachingRecord(
    question=question,
    probe="",
    teacher_rollout=types.Rollout(prompt, completion),
    teaching=None,
    num_teaching_tokens=0,
    baseline=(attempt,),
    taught=(attempt,),
    leaked=False,
  )


def _group(number, size=4, **fields):
  return [_record(_QUESTIONS[number], i, **fields) for i in range(size)]


@functools.cache
def _updater(changes):
  return grpo_update.GrpoUpdate(
    trainable.full_policy(_MODEL),
    _optimizer(),
    shardings=train_state.shardings(_start()),
    mesh=tiny.mesh(),
    config=_config(**dict(changes)),
  )


def _start():
  return train_state.create(
    tiny.params_of(_MODEL),
    _optimizer(),
    mesh=tiny.mesh(),
    reference=tiny.params_of(_MODEL, 1),
  )


def _update(records, values, *, size=4, step=0, **changes):
  """Runs the updates of one step; returns the new state and metrics."""
  changes["sampling.teach.group_size"] = size
  state = _start()
  state, metrics = _updater(tuple(sorted(changes.items()))).update(
    state._replace(step=state.step + step),
    records,
    [types.Reward(value) for value in values],
    is_compared=False,
  )
  return jax.device_get(state), metrics


def _assert_same(left, right):
  jax.tree.map(np.testing.assert_array_equal, left, right)


_VALUES = [1.0, 0.0, 0.5, 0.25]


def test_groups_of_equal_rewards_are_filtered_and_counted():
  alone, alone_metrics = _update(_group(0), _VALUES)
  both, metrics = _update(_group(0) + _group(1), [*_VALUES, 0.7, 0.7, 0.7, 0.7])
  _assert_same(both.params, alone.params)
  assert alone_metrics["groups/used_fraction"] == 1.0
  assert metrics["groups/used_fraction"] == 0.5
  assert metrics["num_tokens"] == alone_metrics["num_tokens"]


def test_a_step_without_usable_groups_changes_nothing():
  state, metrics = _update(_group(0), [0.5] * 4)
  _assert_same(state.params, jax.device_get(tiny.params_of(_MODEL)))
  expected = {
    "groups/used_fraction": 0.0,
    "groups/truncated_fraction": 0.0,
    "num_tokens": 0,
    "num_flops": 0.0,
  }
  assert metrics == expected


def test_a_missing_reward_is_not_a_reward_of_zero():
  without, expected = _update(_group(0, size=3), _VALUES[:3], size=3)
  missing, metrics = _update(_group(0), [*_VALUES[:3], None])
  _assert_same(missing.params, without.params)
  assert metrics["num_tokens"] == expected["num_tokens"]


def test_missing_rewards_are_counted_and_never_averaged():
  rewarded = [types.Reward(0.5), types.Reward(None, "no judge")] * 2
  described = grpo._record_metrics(_group(0), rewarded)
  assert described["rewards/unavailable"] == 2
  assert described["reward"] == 0.5
  none = grpo._record_metrics(_group(0), [types.Reward(None, "no judge")] * 4)
  assert none["rewards/unavailable"] == 4
  assert "reward" not in none


def test_mask_truncated_masks_truncated_completions():
  def run(token, mask_truncated):
    records = _group(0)
    records[1] = _record(_QUESTIONS[0], 1, token=token, finish_reason="length")
    state, metrics = _update(
      records, _VALUES, **{"batch.mask_truncated": mask_truncated}
    )
    return state.params, metrics["num_tokens"]

  masked, num_masked = run(20, True)
  _assert_same(run(40, True)[0], masked)
  kept, num_kept = run(20, False)
  assert num_kept - num_masked == 3 + 5
  with pytest.raises(AssertionError):
    _assert_same(run(40, False)[0], kept)


def test_a_group_whose_completions_are_all_masked_is_not_used():
  records = [
    _record(_QUESTIONS[0], i, finish_reason="length")
    for i in range(len(_VALUES))
  ]
  state, metrics = _update(records, _VALUES, **{"batch.mask_truncated": True})
  _assert_same(state.params, jax.device_get(tiny.params_of(_MODEL)))
  assert metrics["groups/used_fraction"] == 0.0
  assert metrics["groups/truncated_fraction"] == 1.0
  assert metrics["num_tokens"] == 0


def test_the_reference_is_mixed_with_the_policy_every_sync_interval():
  reference = jax.device_get(tiny.params_of(_MODEL, 1))
  for step in (0, 1):
    state, _ = _update(_group(0), [0.5] * 4, step=step)
    _assert_same(state.reference, reference)
  state, _ = _update(_group(0), [0.5] * 4, step=_SYNC_EVERY - 1)
  jax.tree.map(
    lambda mixed, ref, new: np.testing.assert_allclose(
      mixed, (1 - _MIX) * ref + _MIX * new, rtol=1e-6, atol=1e-7
    ),
    state.reference,
    reference,
    state.params,
  )
