# SPDX-License-Identifier: Apache-2.0
"""KL estimators: values, and expected values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.losses import kl

_V = 7
_ALL = ("k1", "k2", "k3")


def _policies():
  """Logits of policy, reference, and the older policy that drew the tokens."""
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(size=_V), jnp.float32) for _ in range(3)]


def _divergence(left_V, right_V):
  """KL(left || right), summed over the vocabulary."""
  left_V, right_V = jax.nn.log_softmax(left_V), jax.nn.log_softmax(right_V)
  return jnp.sum(jnp.exp(left_V) * (left_V - right_V))


def _mean_gradient(estimator, *, drawn_by_V, weighted):
  """Computes the expected gradient of a loss over drawn tokens."""
  policy_V, reference_V, _ = _policies()
  drawn_V = jax.nn.log_softmax(drawn_by_V)

  def loss(policy_V):
    logprobs_V = jax.nn.log_softmax(policy_V)
    kl_V = kl.estimate(
      logprobs_V - jax.nn.log_softmax(reference_V), estimator=estimator
    )
    if weighted:
      ratio_V = jnp.exp(logprobs_V - drawn_V)
      kl_V = kl.weighted(kl_V, ratio_V, estimator=estimator)
    return jnp.sum(jnp.exp(drawn_V) * kl_V)

  return jax.grad(loss)(policy_V)


@pytest.mark.parametrize(
  ("gap", "k1", "k2", "k3"),
  [
    (0.0, 0.0, 0.0, 0.0),
    (np.log(2), np.log(2), np.log(2) ** 2 / 2, np.log(2) - 0.5),
    (-np.log(2), -np.log(2), np.log(2) ** 2 / 2, 1 - np.log(2)),
  ],
)
def test_estimates_of_known_gaps(gap, k1, k2, k3):
  for estimator, want in zip(_ALL, (k1, k2, k3), strict=True):
    got = kl.estimate(jnp.float32(gap), estimator=estimator)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_k1_and_k3_are_unbiased():
  policy_V, reference_V, _ = _policies()
  gap_V = jax.nn.log_softmax(policy_V) - jax.nn.log_softmax(reference_V)
  for estimator in ("k1", "k3"):
    mean = jnp.sum(
      jax.nn.softmax(policy_V) * kl.estimate(gap_V, estimator=estimator)
    )
    want = _divergence(policy_V, reference_V)
    np.testing.assert_allclose(mean, want, rtol=1e-5)


def test_plain_on_policy_gradients_are_zero_forward_and_reverse():
  policy_V, reference_V, _ = _policies()
  k1_V, k2_V, k3_V = (
    _mean_gradient(estimator, drawn_by_V=policy_V, weighted=False)
    for estimator in _ALL
  )
  np.testing.assert_allclose(k1_V, 0.0, atol=1e-6)
  there_V = jax.grad(lambda x_V: _divergence(x_V, reference_V))(policy_V)
  np.testing.assert_allclose(k2_V, there_V, atol=1e-6)
  back_V = jax.grad(lambda x_V: _divergence(reference_V, x_V))(policy_V)
  np.testing.assert_allclose(k3_V, back_V, atol=1e-6)
  assert np.abs(there_V - back_V).max() > 0.01


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("estimator", _ALL)
def test_weighted_gradients_match_the_divergence(estimator, on_policy):
  policy_V, reference_V, old_V = _policies()
  grad_V = _mean_gradient(
    estimator, drawn_by_V=policy_V if on_policy else old_V, weighted=True
  )
  want_V = jax.grad(lambda x_V: _divergence(x_V, reference_V))(policy_V)
  np.testing.assert_allclose(grad_V, want_V, atol=1e-6)


def test_penalty_of_a_sequence_is_the_sum_over_tokens():
  old_BT = jnp.array([[1.0, 2.0, jnp.nan], [jnp.nan] * 3])
  ref_BT = jnp.array([[0.5, 3.0, 9.0], [0.0] * 3])
  penalty_B = kl.of_sequences(
    old_BT, ref_BT, ~jnp.isnan(old_BT), estimator="k1"
  )
  np.testing.assert_allclose(penalty_B, [0.5 - 1.0, 0.0])


def test_unknown_estimator_is_rejected():
  with pytest.raises(ValueError, match="k4"):
    kl.estimate(jnp.zeros(1), estimator="k4")
