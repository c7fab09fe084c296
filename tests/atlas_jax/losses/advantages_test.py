# SPDX-License-Identifier: Apache-2.0
"""Advantages: known values, limits and missing rewards."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax import errors
from atlas_jax.losses import advantages

_GRPO = dict(baseline="mean", scale="group")
_DR_GRPO = dict(baseline="mean", scale="none")
_ALL = [
  dict(baseline=baseline, scale=scale)
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
  how = dict(baseline=baseline, scale=scale)
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
    rewards_PC, ~np.isnan(rewards_PC), baseline="leave_one_out", scale="none"
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
    rewards_PC, valid_PC, baseline="mean", scale="batch"
  )
  std = np.std(rewards_PC[valid_PC], ddof=1) + 1e-4
  want_PC = np.array([[0.5, -0.5, 0.0], [0.5, 0.0, -0.5], [0.0] * 3]) / std
  np.testing.assert_allclose(advantages_PC, want_PC, atol=1e-6)


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
