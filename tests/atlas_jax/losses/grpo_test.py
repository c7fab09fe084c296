# SPDX-License-Identifier: Apache-2.0
"""GRPO loss against the paper, in its limits and under padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax import errors
from atlas_jax.losses import grpo, reduce

_B, _T = 6, 9
_LENGTH = 11
_HYPER = dict(
  ratio="token",
  clipping="objective",
  clip_low=0.2,
  clip_high=0.28,
  max_ratio=None,
  kl_coef=0.04,
  kl_estimator="k3",
  kl_in="loss",
  entropy_coef=0.0,
  aggregate="sequence_mean",
  max_tokens=_LENGTH,
)


def _batch(spread=0.4):
  """Returns arguments of `surrogate`; lengths 1 to T, one empty."""
  rng = np.random.default_rng(0)
  logprobs_BT = -rng.exponential(size=(_B, _T))
  old_BT = logprobs_BT + spread * rng.normal(size=(_B, _T))
  ref_BT = logprobs_BT + spread * rng.normal(size=(_B, _T))
  entropy_BT = rng.uniform(0.0, 3.0, (_B, _T))
  advantages_B = np.array([1.2, -0.7, -1.5, 0.3, 0.8, -0.4])
  lengths_B = np.array([9, 1, 4, 0, 7, 3])
  mask_BT = np.arange(_T) < lengths_B[:, None]
  return [
    *(
      jnp.asarray(x, jnp.float32)
      for x in (logprobs_BT, old_BT, ref_BT, entropy_BT, advantages_B)
    ),
    jnp.asarray(mask_BT),
  ]


def _weights():
  rng = np.random.default_rng(3)
  return jnp.asarray(rng.uniform(0.5, 2.0, (_B, _T)), jnp.float32)


def _objective(**changes):
  return grpo.Objective(**{**_HYPER, **changes})


def _paper(batch, weights_BT, *, at, objective):
  """Computes the objective token by token, in float64.

  Where the papers stop the gradient, `at` stands for the log-probabilities.
  """
  logprobs_BT, old_BT, ref_BT, entropy_BT, advantages_B, mask_BT = batch
  o, loss = objective, 0.0
  for b in np.flatnonzero(mask_BT.any(1)):
    num_tokens = mask_BT[b].sum()
    share = {
      "token_mean": 1 / mask_BT.sum(),
      "sequence_mean": 1 / (num_tokens * mask_BT.any(1).sum()),
      "constant_length": 1 / (_LENGTH * mask_BT.any(1).sum()),
    }[o.aggregate]

    def ratio_of(x_BT, t, b=b):
      gaps_T = np.where(mask_BT[b], x_BT[b] - old_BT[b], 0.0)
      at_T = np.where(mask_BT[b], at[b] - old_BT[b], 0.0)
      return {
        "token": np.exp(gaps_T[t]),
        "sequence": np.exp(gaps_T[mask_BT[b]].mean()),
        "sequence_token": np.exp(
          at_T[mask_BT[b]].mean() + x_BT[b, t] - at[b, t]
        ),
        "product": np.exp(gaps_T.sum()),
      }[o.ratio]

    for t in np.flatnonzero(mask_BT[b]):
      advantage = advantages_B[b]
      ratio, ratio_at = ratio_of(logprobs_BT, t), ratio_of(at, t)
      low, high = 1 - o.clip_low, 1 + o.clip_high
      if o.clipping == "objective":
        bounded = ratio if o.max_ratio is None else min(ratio, o.max_ratio)
        gain = min(bounded * advantage, min(max(ratio, low), high) * advantage)
      else:
        weight = min(max(ratio_at, low), high)
        gain = weight * advantage * logprobs_BT[b, t]
      gap = logprobs_BT[b, t] - ref_BT[b, t]
      kl = {"k1": gap, "k2": gap**2 / 2, "k3": np.exp(-gap) - 1 + gap}
      penalty = (
        kl[o.kl_estimator]
        * {
          "loss": 1.0,
          "weighted_loss": ratio_at if o.kl_estimator == "k2" else ratio,
          "reward": 0.0,
        }[o.kl_in]
      )
      loss += share * (
        o.kl_coef * penalty
        - weights_BT[b, t] * gain
        - o.entropy_coef * entropy_BT[b, t]
      )
  return loss


def _paper_grad(batch, weights_BT, *, objective, step=1e-6):
  """Differentiates `_paper` by central differences."""
  at, *rest = batch
  grad_BT = np.zeros((_B, _T))
  for b, t in np.argwhere(batch[-1]):
    up, down = at.copy(), at.copy()
    up[b, t] += step
    down[b, t] -= step
    rise = [
      _paper([x_BT, *rest], weights_BT, at=at, objective=objective)
      for x_BT in (up, down)
    ]
    grad_BT[b, t] = (rise[0] - rise[1]) / (2 * step)
  return grad_BT


def _loss_and_grad(batch, weights_BT, **changes):
  def loss(logprobs_BT):
    return grpo.surrogate(
      logprobs_BT,
      *batch[1:],
      rollout_weights_BT=weights_BT,
      objective=_objective(**changes),
    )

  (value, metrics), grad_BT = jax.value_and_grad(loss, has_aux=True)(batch[0])
  return (value, _means(metrics)), grad_BT


def _means(metrics):
  return {
    name: value.mean if isinstance(value, reduce.Mean) else value
    for name, value in metrics.items()
  }


# Sequence ratios are closer to 1.
_NARROW = dict(clip_low=0.02, clip_high=0.03)
_FAMILY = [
  {},
  {"kl_coef": 0.0},
  {"aggregate": "token_mean"},
  {"aggregate": "constant_length"},
  {"max_ratio": 1.4},
  {"ratio": "sequence", **_NARROW},
  {"ratio": "sequence_token", "aggregate": "token_mean", **_NARROW},
  {"ratio": "product"},
  {"clipping": "weight"},
  {"clipping": "weight", "ratio": "sequence", **_NARROW},
  {"kl_estimator": "k2"},
  {"kl_in": "weighted_loss"},
  {"kl_in": "weighted_loss", "kl_estimator": "k1"},
  {"kl_in": "weighted_loss", "kl_estimator": "k2"},
  {"kl_in": "reward", "kl_estimator": "k1"},
  {"entropy_coef": 0.3},
]


@pytest.mark.parametrize("changes", _FAMILY, ids=str)
def test_loss_and_gradient_match_the_paper(changes):
  batch, weights_BT = _batch(), _weights()
  (loss, metrics), grad_BT = _loss_and_grad(batch, weights_BT, **changes)

  *floats, mask_BT = batch
  exact = [*(np.asarray(x, np.float64) for x in floats), np.asarray(mask_BT)]
  hyper = dict(objective=_objective(**changes))
  want = _paper(exact, np.asarray(weights_BT), at=exact[0], **hyper)
  want_grad_BT = _paper_grad(exact, np.asarray(weights_BT), **hyper)
  np.testing.assert_allclose(loss, want, atol=1e-6)
  np.testing.assert_allclose(grad_BT, want_grad_BT, atol=1e-6)
  assert metrics["clip_low_fraction"] + metrics["clip_high_fraction"] > 0.0


@pytest.mark.parametrize("garbage", [0.0, 1e9, -jnp.inf, jnp.nan])
@pytest.mark.parametrize("changes", _FAMILY, ids=str)
def test_padding_changes_neither_loss_nor_gradient(garbage, changes):
  batch, weights_BT = _batch(), _weights()
  mask_BT = batch[-1]

  def dirty(x_BT):
    return jnp.where(mask_BT, x_BT, garbage)

  dirty_batch = [
    *(dirty(x_BT) for x_BT in batch[:4]),
    jnp.where(mask_BT.any(1), batch[4], garbage),
    mask_BT,
  ]
  jax.tree.map(
    np.testing.assert_array_equal,
    _loss_and_grad(dirty_batch, dirty(weights_BT), **changes),
    _loss_and_grad(batch, weights_BT, **changes),
  )


@pytest.mark.parametrize("changes", _FAMILY, ids=str)
def test_wider_padding_changes_nothing(changes):
  batch, weights_BT = _batch(), _weights()

  def wider(x):
    return x if x.ndim == 1 else jnp.pad(x, [(0, 0), (0, 5)])

  clean, grad_BT = _loss_and_grad(batch, weights_BT, **changes)
  padded, padded_grad_BT = _loss_and_grad(
    [wider(x) for x in batch], wider(weights_BT), **changes
  )
  np.testing.assert_allclose(padded[0], clean[0], rtol=1e-5)
  np.testing.assert_allclose(padded_grad_BT, wider(grad_BT), rtol=1e-5)


@pytest.mark.parametrize("changes", _FAMILY, ids=str)
def test_order_of_sequences_does_not_matter(changes):
  batch, weights_BT = _batch(), _weights()
  order_B = np.array([3, 0, 5, 1, 4, 2])
  clean, grad_BT = _loss_and_grad(batch, weights_BT, **changes)
  mixed, mixed_grad_BT = _loss_and_grad(
    [x[order_B] for x in batch], weights_BT[order_B], **changes
  )
  np.testing.assert_allclose(mixed[0], clean[0], rtol=1e-5)
  np.testing.assert_allclose(mixed_grad_BT, grad_BT[order_B], rtol=1e-5)


@pytest.mark.parametrize("changes", _FAMILY, ids=str)
def test_loss_and_gradient_are_zero_without_counted_tokens(changes):
  *batch, mask_BT = _batch()
  (loss, metrics), grad_BT = _loss_and_grad(
    [*batch, jnp.zeros_like(mask_BT)], _weights(), **changes
  )
  assert loss == 0.0
  assert all(value == 0.0 for value in metrics.values())
  np.testing.assert_array_equal(grad_BT, 0.0)


@pytest.mark.parametrize("changes", _FAMILY, ids=str)
def test_only_the_policy_gets_a_gradient(changes):
  batch, weights_BT = _batch(), _weights()

  def loss(old_BT, ref_BT, advantages_B, weights_BT):
    return grpo.surrogate(
      batch[0],
      old_BT,
      ref_BT,
      batch[3],
      advantages_B,
      batch[5],
      rollout_weights_BT=weights_BT,
      objective=_objective(**changes),
    )[0]

  arrays = (batch[1], batch[2], batch[4], weights_BT)
  for grad in jax.grad(loss, argnums=(0, 1, 2, 3))(*arrays):
    np.testing.assert_array_equal(grad, 0.0)


@pytest.mark.parametrize("aggregate", reduce.AGGREGATES)
@pytest.mark.parametrize("ratio", ["token", "sequence", "product"])
def test_metrics_of_unequal_parts_add_up(aggregate, ratio):
  batch, weights_BT = _batch(), _weights()
  objective = _objective(aggregate=aggregate, ratio=ratio, **_NARROW)

  def metrics(rows):
    _, found = grpo.surrogate(
      *(x[rows] for x in batch),
      rollout_weights_BT=weights_BT[rows],
      objective=objective,
    )
    del found["loss"]  # Weighted by the caller.
    return found

  parts = [metrics(slice(*ends)) for ends in ((0, 1), (1, 3), (3, 6))]
  highest = max(part.pop("ratio_max") for part in parts)
  total = _means(jax.tree.map(lambda *x: sum(x), *parts))
  total["ratio_max"] = highest
  whole = _means(metrics(slice(None)))
  assert whole["clip_low_fraction"] + whole["clip_high_fraction"] > 0.0
  for name, value in whole.items():
    np.testing.assert_allclose(total[name], value, rtol=1e-5, err_msg=name)


def test_metrics_of_sequence_ratios_are_means_over_sequences():
  batch, ones_BT = _batch(), jnp.ones((_B, _T))
  (_, metrics), _ = _loss_and_grad(batch, ones_BT, ratio="product")
  logprobs_BT, old_BT, *_, mask_BT = batch
  ratio_B = jnp.exp(jnp.sum(logprobs_BT - old_BT, axis=1, where=mask_BT))
  want = jnp.mean(ratio_B, where=mask_BT.any(axis=1))
  np.testing.assert_allclose(metrics["ratio_mean"], want, rtol=1e-5)


def test_without_a_reference_the_kl_is_from_the_old_policy():
  batch, weights_BT = _batch(), _weights()
  batch[2] = batch[1]
  (loss, other), _ = _loss_and_grad(batch, weights_BT, kl_coef=0.0)
  batch[2] = None
  (same, metrics), _ = _loss_and_grad(batch, weights_BT, kl_coef=0.0)
  assert loss == same
  assert metrics["kl_old"] == other["kl"] > 0.0
  assert "kl" not in metrics
  assert "kl_old" not in other


def _on_policy():
  logprobs_BT, _, _, entropy_BT, advantages_B, mask_BT = _batch()
  fixed = [logprobs_BT] * 3
  return [*fixed, entropy_BT, advantages_B, mask_BT]


@pytest.mark.parametrize("clipping", ["objective", "weight"])
@pytest.mark.parametrize("ratio", ["token", "sequence_token"])
def test_on_policy_gradient_is_the_plain_policy_gradient(clipping, ratio):
  batch = _on_policy()
  *_, advantages_B, mask_BT = batch
  changes = dict(clipping=clipping, ratio=ratio, aggregate="token_mean")

  (_, metrics), grad_BT = _loss_and_grad(batch, jnp.ones((_B, _T)), **changes)

  want_BT = jnp.where(mask_BT, -advantages_B[:, None], 0.0) / mask_BT.sum()
  np.testing.assert_allclose(grad_BT, want_BT, rtol=1e-6)
  assert metrics["ratio_mean"] == metrics["ratio_max"] == 1.0
  assert metrics["kl"] == metrics["clip_low_fraction"] == 0.0


def test_on_policy_product_gradient_is_length_times_gspo():
  """RLOO sums a sequence's log-probabilities, where GSPO takes their mean."""
  batch = _on_policy()
  _, product_BT = _loss_and_grad(batch, jnp.ones((_B, _T)), ratio="product")
  _, mean_BT = _loss_and_grad(batch, jnp.ones((_B, _T)), ratio="sequence")
  lengths_B1 = batch[-1].sum(1, keepdims=True)
  np.testing.assert_allclose(product_BT, mean_BT * lengths_B1, rtol=1e-6)


def test_gspo_token_has_the_gradient_of_gspo():
  batch, ones_BT = _batch(), jnp.ones((_B, _T))
  (want, _), want_BT = _loss_and_grad(batch, ones_BT, ratio="sequence")
  (loss, _), grad_BT = _loss_and_grad(batch, ones_BT, ratio="sequence_token")
  np.testing.assert_allclose(loss, want, rtol=1e-6)
  np.testing.assert_allclose(grad_BT, want_BT, rtol=1e-5, atol=1e-9)


def test_wide_weight_clipping_is_importance_sampling():
  batch, weights_BT = _batch(), _weights()
  wide = dict(clip_low=1.0, clip_high=1e9)
  _, weight_BT = _loss_and_grad(batch, weights_BT, clipping="weight", **wide)
  _, objective_BT = _loss_and_grad(batch, weights_BT, **wide)
  np.testing.assert_allclose(weight_BT, objective_BT, rtol=1e-5)


@pytest.mark.parametrize(
  ("ratio", "advantage", "low", "high"),
  [(0.5, -1, 1, 0), (0.5, 1, 0, 0), (2.0, 1, 0, 1), (2.0, -1, 0, 0)],
)
def test_clip_fractions_count_tokens_without_gradient(
  ratio, advantage, low, high
):
  batch = [
    jnp.log(jnp.full((1, 1), ratio)),
    *[jnp.zeros((1, 1))] * 3,
    jnp.full(1, float(advantage)),
    jnp.ones((1, 1), bool),
  ]
  (_, metrics), grad_BT = _loss_and_grad(batch, jnp.ones((1, 1)), kl_coef=0.0)
  assert metrics["clip_low_fraction"] == low
  assert metrics["clip_high_fraction"] == high
  assert (grad_BT[0, 0] == 0.0) == bool(low or high)


@pytest.mark.parametrize(
  ("wrong", "match"),
  [
    ({"ratio": "word"}, "ratio=word"),
    ({"clipping": "loss"}, "clipping=loss"),
    ({"kl_estimator": "k4"}, "kl_estimator=k4"),
    ({"kl_in": "advantage"}, "kl_in=advantage"),
    ({"aggregate": "sum"}, "aggregate=sum"),
    ({"clip_low": -0.1}, "clip_low=-0.1"),
    ({"clip_high": -0.1}, "clip_high=-0.1"),
    ({"max_ratio": 1.2}, "max_ratio=1.2"),
    ({"max_ratio": 4.0, "clipping": "weight"}, "max_ratio=4.0"),
    ({"kl_estimator": "k1"}, "kl_estimator=k1"),
  ],
)
def test_invalid_objective_is_rejected(wrong, match):
  with pytest.raises(errors.ConfigError, match=match):
    _objective(**wrong)
