# SPDX-License-Identifier: Apache-2.0
"""The GRPO loss against the paper, at its limits and under padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.losses import grpo

_B, _T = 6, 9
_HYPER = dict(
  clip_low=0.2, clip_high=0.28, kl_coef=0.04, aggregate="sequence_mean"
)


def _batch(spread=0.4):
  """Logprobs, old, reference, advantages, mask; lengths 1 to T, one empty."""
  rng = np.random.default_rng(0)
  logprobs_BT = -rng.exponential(size=(_B, _T))
  old_BT = logprobs_BT + spread * rng.normal(size=(_B, _T))
  ref_BT = logprobs_BT + spread * rng.normal(size=(_B, _T))
  advantages_B = np.array([1.2, -0.7, -1.5, 0.3, 0.8, -0.4])
  lengths_B = np.array([9, 1, 4, 0, 7, 3])
  mask_BT = np.arange(_T) < lengths_B[:, None]
  return [
    *(
      jnp.asarray(x, jnp.float32)
      for x in (logprobs_BT, old_BT, ref_BT, advantages_B)
    ),
    jnp.asarray(mask_BT),
  ]


def _weights():
  rng = np.random.default_rng(3)
  return jnp.asarray(rng.uniform(0.5, 2.0, (_B, _T)), jnp.float32)


def _paper(batch, weights_BT, *, clip_low, clip_high, kl_coef, aggregate):
  """Transcribes the objective token by token, in float64, and its gradient."""
  logprobs_BT, old_BT, ref_BT, advantages_B, mask_BT = (
    np.asarray(x, np.float64) for x in batch
  )
  num_tokens_B = mask_BT.sum(1)
  loss, grad_BT = 0.0, np.zeros((_B, _T))
  for b, t in np.argwhere(mask_BT):
    share = (
      1 / (num_tokens_B[b] * (num_tokens_B > 0).sum())
      if aggregate == "sequence_mean"
      else 1 / num_tokens_B.sum()
    )
    advantage, weight = advantages_B[b], float(weights_BT[b, t])
    ratio = np.exp(logprobs_BT[b, t] - old_BT[b, t])
    bounded = min(max(ratio, 1 - clip_low), 1 + clip_high)
    gain = min(ratio * advantage, bounded * advantage)
    slope = ratio * advantage if ratio * advantage == gain else 0.0
    ref_ratio = np.exp(ref_BT[b, t] - logprobs_BT[b, t])
    kl = ref_ratio - np.log(ref_ratio) - 1
    loss += share * (kl_coef * kl - weight * gain)
    grad_BT[b, t] = share * (kl_coef * (1 - ref_ratio) - weight * slope)
  return loss, grad_BT


def _loss_and_grad(batch, weights_BT, **hyper):
  def loss(logprobs_BT):
    return grpo.clipped_surrogate(
      logprobs_BT, *batch[1:], rollout_weights_BT=weights_BT, **hyper
    )

  return jax.value_and_grad(loss, has_aux=True)(batch[0])


@pytest.mark.parametrize("aggregate", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.04])
def test_loss_and_gradient_are_the_papers(aggregate, kl_coef):
  batch, weights_BT = _batch(), _weights()
  hyper = {**_HYPER, "aggregate": aggregate, "kl_coef": kl_coef}

  (loss, metrics), grad_BT = _loss_and_grad(batch, weights_BT, **hyper)

  want, want_grad_BT = _paper(batch, weights_BT, **hyper)
  np.testing.assert_allclose(loss, want, atol=1e-6)
  np.testing.assert_allclose(grad_BT, want_grad_BT, atol=1e-6)
  assert metrics["clip_low_fraction"] > 0.0
  assert metrics["clip_high_fraction"] > 0.0


@pytest.mark.parametrize("garbage", [0.0, 1e9, -jnp.inf, jnp.nan])
@pytest.mark.parametrize("aggregate", ["sequence_mean", "token_mean"])
def test_padding_changes_neither_loss_nor_gradient(garbage, aggregate):
  batch, weights_BT = _batch(), _weights()
  mask_BT = batch[-1]

  def dirty(x_BT):
    return jnp.where(mask_BT, x_BT, garbage)

  dirty_batch = [
    *(dirty(x_BT) for x_BT in batch[:3]),
    jnp.where(mask_BT.any(1), batch[3], garbage),
    mask_BT,
  ]
  hyper = {**_HYPER, "aggregate": aggregate}
  jax.tree.map(
    np.testing.assert_array_equal,
    _loss_and_grad(dirty_batch, dirty(weights_BT), **hyper),
    _loss_and_grad(batch, weights_BT, **hyper),
  )


def test_wider_padding_changes_nothing():
  batch, weights_BT = _batch(), _weights()

  def wider(x):
    return x if x.ndim == 1 else jnp.pad(x, [(0, 0), (0, 5)])

  clean, grad_BT = _loss_and_grad(batch, weights_BT, **_HYPER)
  padded, padded_grad_BT = _loss_and_grad(
    [wider(x) for x in batch], wider(weights_BT), **_HYPER
  )
  np.testing.assert_allclose(padded[0], clean[0], rtol=1e-6)
  np.testing.assert_allclose(padded_grad_BT, wider(grad_BT), rtol=1e-6)


def test_order_of_sequences_does_not_matter():
  batch, weights_BT = _batch(), _weights()
  order_B = np.array([3, 0, 5, 1, 4, 2])
  clean, grad_BT = _loss_and_grad(batch, weights_BT, **_HYPER)
  mixed, mixed_grad_BT = _loss_and_grad(
    [x[order_B] for x in batch], weights_BT[order_B], **_HYPER
  )
  np.testing.assert_allclose(mixed[0], clean[0], rtol=1e-6)
  np.testing.assert_allclose(mixed_grad_BT, grad_BT[order_B], rtol=1e-6)


def test_nothing_counted_is_zero_everywhere():
  *batch, mask_BT = _batch()
  (loss, metrics), grad_BT = _loss_and_grad(
    [*batch, jnp.zeros_like(mask_BT)], _weights(), **_HYPER
  )
  assert loss == 0.0
  assert all(value == 0.0 for value in metrics.values())
  np.testing.assert_array_equal(grad_BT, 0.0)


def test_only_the_policy_gets_a_gradient():
  batch, weights_BT = _batch(), _weights()

  def loss(old_BT, ref_BT, advantages_B, weights_BT):
    return grpo.clipped_surrogate(
      batch[0],
      old_BT,
      ref_BT,
      advantages_B,
      batch[4],
      rollout_weights_BT=weights_BT,
      **_HYPER,
    )[0]

  for grad in jax.grad(loss, argnums=(0, 1, 2, 3))(*batch[1:4], weights_BT):
    np.testing.assert_array_equal(grad, 0.0)


def test_on_policy_it_is_the_plain_policy_gradient():
  logprobs_BT, _, _, advantages_B, mask_BT = _batch()
  on_policy = [logprobs_BT, logprobs_BT, logprobs_BT, advantages_B, mask_BT]
  hyper = {**_HYPER, "aggregate": "token_mean"}

  (_, metrics), grad_BT = _loss_and_grad(on_policy, jnp.ones((_B, _T)), **hyper)

  want_BT = jnp.where(mask_BT, -advantages_B[:, None], 0.0) / mask_BT.sum()
  np.testing.assert_allclose(grad_BT, want_BT, rtol=1e-6)
  assert metrics["ratio_mean"] == metrics["ratio_max"] == 1.0
  assert metrics["kl"] == metrics["clip_low_fraction"] == 0.0


@pytest.mark.parametrize(
  ("gap", "want"),
  [(0.0, 0.0), (np.log(2), 1 - np.log(2)), (-np.log(2), np.log(2) - 0.5)],
)
def test_kl_of_known_gaps(gap, want):
  zero_BT = jnp.zeros((1, 1))
  _, metrics = grpo.clipped_surrogate(
    zero_BT,
    zero_BT,
    zero_BT + gap,
    jnp.zeros(1),
    jnp.ones((1, 1), bool),
    rollout_weights_BT=jnp.ones((1, 1)),
    **_HYPER,
  )
  np.testing.assert_allclose(metrics["kl"], want, atol=1e-6)


@pytest.mark.parametrize(
  ("ratio", "advantage", "low", "high"),
  [(0.5, -1, 1, 0), (0.5, 1, 0, 0), (2.0, 1, 0, 1), (2.0, -1, 0, 0)],
)
def test_a_token_is_clipped_only_where_its_gradient_is(
  ratio, advantage, low, high
):
  batch = [
    jnp.log(jnp.full((1, 1), ratio)),
    *[jnp.zeros((1, 1))] * 2,
    jnp.full(1, float(advantage)),
    jnp.ones((1, 1), bool),
  ]
  hyper = {**_HYPER, "kl_coef": 0.0}
  (_, metrics), grad_BT = _loss_and_grad(batch, jnp.ones((1, 1)), **hyper)
  assert metrics["clip_low_fraction"] == low
  assert metrics["clip_high_fraction"] == high
  assert (grad_BT[0, 0] == 0.0) == bool(low or high)


def test_advantages_of_known_rewards():
  advantages_PC = grpo.group_advantages(
    np.array([[1.0, 0.0, 0.0, 1.0], [3.0, 3.0, 3.0, 3.0]]),
    np.ones((2, 4), bool),
    scale_by_std=True,
  )
  np.testing.assert_allclose(
    advantages_PC[0], [0.865875, -0.865875, -0.865875, 0.865875], atol=1e-6
  )
  np.testing.assert_array_equal(advantages_PC[1], 0.0)


def test_unscaled_advantages_are_the_distance_to_the_mean():
  advantages_PC = grpo.group_advantages(
    np.array([[1.0, 0.0, 0.0, 3.0]]), np.ones((1, 4), bool), scale_by_std=False
  )
  np.testing.assert_array_equal(advantages_PC, [[0.0, -1.0, -1.0, 2.0]])


@pytest.mark.parametrize("reward", [0.1, 0.7, -1e-3, 123.456])
@pytest.mark.parametrize("scale_by_std", [True, False])
def test_equal_rewards_teach_exactly_nothing(reward, scale_by_std):
  advantages_PC = grpo.group_advantages(
    np.full((1, 7), reward), np.ones((1, 7), bool), scale_by_std=scale_by_std
  )
  np.testing.assert_array_equal(advantages_PC, 0.0)


@pytest.mark.parametrize("garbage", [jnp.nan, jnp.inf, -1e30])
@pytest.mark.parametrize("scale_by_std", [True, False])
def test_missing_rewards_are_as_if_never_asked_for(garbage, scale_by_std):
  rewards_PC = np.array(
    [[1.0, garbage, 0.5, 0.0], [garbage, 1.0, garbage, garbage], [garbage] * 4]
  )
  valid_PC = rewards_PC != garbage
  valid_PC &= ~np.isnan(rewards_PC)

  advantages_PC = grpo.group_advantages(
    rewards_PC, valid_PC, scale_by_std=scale_by_std
  )

  alone_PC = grpo.group_advantages(
    np.array([[1.0, 0.5, 0.0]]),
    np.ones((1, 3), bool),
    scale_by_std=scale_by_std,
  )
  np.testing.assert_allclose(
    advantages_PC[0, [0, 2, 3]], alone_PC[0], rtol=1e-6
  )
  assert advantages_PC[0, 1] == 0.0
  np.testing.assert_array_equal(advantages_PC[1:], 0.0)


def test_sampler_correction_is_the_truncated_ratio():
  old_BT = jnp.log(jnp.array([[0.5, 0.4, 0.9, jnp.nan]]))
  rollout_BT = jnp.log(jnp.array([[0.25, 0.8, 0.1, 0.0]]))
  mask_BT = jnp.array([[True, True, True, False]])

  def total(old_BT):
    weights_BT = grpo.sampler_correction(
      old_BT, rollout_BT, mask_BT, max_ratio=3.0
    )
    return jnp.sum(weights_BT), weights_BT

  grad_BT, weights_BT = jax.grad(total, has_aux=True)(old_BT)
  np.testing.assert_allclose(weights_BT, [[2.0, 0.5, 3.0, 1.0]], rtol=1e-6)
  np.testing.assert_array_equal(grad_BT, 0.0)
