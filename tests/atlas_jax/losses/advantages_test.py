# SPDX-License-Identifier: Apache-2.0
"""Advantages: known values, limits and missing rewards."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax import errors
from atlas_jax.losses import advantages
from atlas_jax.rewards import teaching
from configs.loss import rcl

_GRPO = dict(baseline="mean", scale="group", min_std=0.0)
_DR_GRPO = dict(baseline="mean", scale="none", min_std=0.0)
_ALL = [
  dict(baseline=baseline, scale=scale, min_std=0.0)
  for baseline, scale in itertools.product(
    ("mean", "leave_one_out"), ("group", "batch", "none")
  )
]


def test_advantages_of_known_rewards():
  advantages_PC = advantages.group_advantages(
    np.array([[1.0, 0.0, 0.0, 1.0], [3.0, 3.0, 3.0, 3.0]]),
    np.ones((2, 4), bool),
    **_GRPO,
  )
  np.testing.assert_allclose(
    advantages_PC[0], [0.865875, -0.865875, -0.865875, 0.865875], atol=1e-6
  )
  np.testing.assert_array_equal(advantages_PC[1], 0.0)


def test_unscaled_advantages_are_differences_to_the_mean():
  advantages_PC = advantages.group_advantages(
    np.array([[1.0, 0.0, 0.0, 3.0]]), np.ones((1, 4), bool), **_DR_GRPO
  )
  np.testing.assert_array_equal(advantages_PC, [[0.0, -1.0, -1.0, 2.0]])


@pytest.mark.parametrize("reward", [0.1, 0.7, -1e-3, 123.456])
@pytest.mark.parametrize("how", _ALL, ids=str)
def test_equal_rewards_have_zero_advantage(reward, how):
  advantages_PC = advantages.group_advantages(
    np.full((1, 7), reward), np.ones((1, 7), bool), **how
  )
  np.testing.assert_array_equal(advantages_PC, 0.0)


@pytest.mark.parametrize("garbage", [jnp.nan, jnp.inf, -1e30])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["group", "none"])
def test_missing_rewards_do_not_affect_the_others(garbage, baseline, scale):
  how = dict(baseline=baseline, scale=scale, min_std=0.0)
  rewards_PC = np.array(
    [[1.0, garbage, 0.5, 0.0], [garbage, 1.0, garbage, garbage], [garbage] * 4]
  )
  valid_PC = rewards_PC != garbage
  valid_PC &= ~np.isnan(rewards_PC)

  advantages_PC = advantages.group_advantages(rewards_PC, valid_PC, **how)

  alone_PC = advantages.group_advantages(
    np.array([[1.0, 0.5, 0.0]]),
    np.ones((1, 3), bool),
    **how,
  )
  np.testing.assert_allclose(
    advantages_PC[0, [0, 2, 3]], alone_PC[0], rtol=1e-6
  )
  assert advantages_PC[0, 1] == 0.0
  np.testing.assert_array_equal(advantages_PC[1:], 0.0)


def test_leave_one_out_is_the_difference_to_the_others_mean():
  rewards_PC = np.array([[1.0, 0.0, 0.5, 3.0], [2.0, np.nan, 1.0, 0.0]])
  advantages_PC = advantages.group_advantages(
    rewards_PC,
    ~np.isnan(rewards_PC),
    baseline="leave_one_out",
    scale="none",
    min_std=0.0,
  )
  want_PC = [
    [1 - 3.5 / 3, 0 - 4.5 / 3, 0.5 - 4 / 3, 3 - 0.5],
    [2 - 0.5, 0.0, 1 - 1.0, 0 - 1.5],
  ]
  np.testing.assert_allclose(advantages_PC, want_PC, atol=1e-6)


def test_batch_deviation_is_over_all_valid_rewards():
  rewards_PC = np.array([[1.0, 0.0, 0.5], [7.0, np.nan, 6.0], [2.0, 2.0, 2.0]])
  valid_PC = ~np.isnan(rewards_PC)
  advantages_PC = advantages.group_advantages(
    rewards_PC, valid_PC, baseline="mean", scale="batch", min_std=0.0
  )
  std = np.std(rewards_PC[valid_PC], ddof=1) + 1e-4
  want_PC = np.array([[0.5, -0.5, 0.0], [0.5, 0.0, -0.5], [0.0] * 3]) / std
  np.testing.assert_allclose(advantages_PC, want_PC, atol=1e-6)


def _by_length(correct, num_tokens):
  """Returns rewards of preset R4 where the student is right alone too."""
  return [
    sum(
      teaching.r3(
        right,
        1.0,
        length,
        efficiency_weight=1.0,
        degradation_penalty_multiplier=0.0,
      ).values()
    )
    for right, length in zip(correct, num_tokens, strict=True)
  ]


def test_brevity_alone_has_small_advantages():
  lengths = [100, 150, 200, 400]
  rewards_PC = np.array(
    [_by_length([1.0] * 4, lengths), _by_length([1.0, 0.0, 1.0, 0.0], lengths)]
  )
  valid_PC = np.ones((2, 4), bool)
  before_PC = advantages.group_advantages(rewards_PC, valid_PC, **_GRPO)
  # A group of right answers only has advantages like any other group.
  np.testing.assert_allclose(np.std(before_PC, axis=1, ddof=1), 1.0, rtol=1e-2)

  config = rcl.get_config().advantages
  after_PC = advantages.group_advantages(rewards_PC, valid_PC, **config)
  brevity, answers = np.max(np.abs(after_PC), axis=1)
  assert brevity < 0.2 * answers
  assert answers > 0.6
  gaps_PC = rewards_PC - rewards_PC.mean(axis=1, keepdims=True)
  np.testing.assert_allclose(after_PC, gaps_PC / (0.5 + 1e-4), rtol=1e-4)


def test_min_std_does_not_change_groups_of_larger_deviation():
  rewards_PC = np.array([[1.0, 0.0, 0.5, 3.0], [0.0, 0.1, 0.0, 0.1]])
  valid_PC = np.ones((2, 4), bool)
  for scale in ("group", "batch"):
    how = dict(baseline="mean", scale=scale)
    with_limit_PC, without_PC = (
      advantages.group_advantages(rewards_PC, valid_PC, **how, min_std=min_std)
      for min_std in (0.5, 0.0)
    )
    np.testing.assert_array_equal(with_limit_PC[0], without_PC[0])
    is_same = (with_limit_PC[1] == without_PC[1]).all()
    assert is_same == (scale == "batch")  # Whose deviation is 1.0.


@pytest.mark.parametrize(
  ("scale", "min_std"), [("group", -0.1), ("group", np.nan), ("none", 0.5)]
)
def test_an_invalid_or_unused_min_std_is_rejected(scale, min_std):
  with pytest.raises(errors.ConfigError, match=f"min_std={min_std}"):
    advantages.group_advantages(
      np.zeros((1, 2)),
      np.ones((1, 2), bool),
      baseline="mean",
      scale=scale,
      min_std=min_std,
    )


def test_only_groups_whose_rewards_differ_have_variance():
  rewards_PC = np.array([[0.1, 0.1], [0.1, 0.2], [0.1, np.nan], [0.0, 0.0]])
  varied_P1 = advantages.has_variance(rewards_PC, ~np.isnan(rewards_PC))
  np.testing.assert_array_equal(varied_P1, [[False], [True], [False], [False]])


@pytest.mark.parametrize("name", ["baseline", "scale"])
def test_unknown_choice_is_rejected(name):
  with pytest.raises(errors.ConfigError, match=f"advantages.{name}=median"):
    advantages.group_advantages(
      np.zeros((1, 2)), np.ones((1, 2), bool), **{**_GRPO, name: "median"}
    )
