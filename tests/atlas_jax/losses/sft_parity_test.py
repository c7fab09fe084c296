# SPDX-License-Identifier: Apache-2.0
"""SFT loss against PyTorch and transformers, on one masked batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.losses import logprobs, sft

torch = pytest.importorskip("torch")
loss_utils = pytest.importorskip("transformers.loss.loss_utils")

_B, _T, _D, _V = 3, 17, 6, 59
_IGNORED = -100


def _batch():
  """Hidden states, head, tokens and which tokens count (never the first)."""
  rng = np.random.default_rng(0)
  hidden_BTD = rng.normal(size=(_B, _T, _D)).astype(np.float32)
  head_DV = rng.normal(size=(_D, _V)).astype(np.float32)
  tokens_BT = rng.integers(0, _V, (_B, _T))
  mask_BT = rng.random((_B, _T)) < 0.6
  mask_BT[:, 0] = False
  return hidden_BTD, head_DV, tokens_BT, mask_BT


def _ours(hidden_BTD, head_DV, tokens_BT, mask_BT):
  """Returns our loss, with shifted targets."""
  stats = logprobs.of_targets(
    hidden_BTD[:, :-1],
    head_DV,
    tokens_BT[:, 1:],
    temperature=1.0,
    chunk_tokens=5,
  )
  return sft.cross_entropy(
    stats.logprobs, stats.log_normalizer, mask_BT[:, 1:], z_loss_coef=0.0
  )[0]


def _torch_cross_entropy(logits_BTV, labels_BT):
  return torch.nn.functional.cross_entropy(
    logits_BTV[:, :-1].flatten(0, 1),
    labels_BT[:, 1:].flatten(),
    ignore_index=_IGNORED,
  )


def _transformers_loss(logits_BTV, labels_BT):
  return loss_utils.ForCausalLMLoss(logits_BTV, labels_BT, vocab_size=_V)


@pytest.mark.parametrize("theirs", [_torch_cross_entropy, _transformers_loss])
def test_loss_and_gradients_match_the_references(theirs):
  hidden_BTD, head_DV, tokens_BT, mask_BT = _batch()
  hidden = torch.tensor(hidden_BTD, requires_grad=True)
  head = torch.tensor(head_DV, requires_grad=True)
  labels = torch.tensor(np.where(mask_BT, tokens_BT, _IGNORED))
  want = theirs(hidden @ head, labels)
  want.backward()

  loss, (hidden_grad_BTD, head_grad_DV) = jax.value_and_grad(
    _ours, argnums=(0, 1)
  )(*map(jnp.asarray, (hidden_BTD, head_DV, tokens_BT, mask_BT)))

  np.testing.assert_allclose(loss, want.item(), atol=1e-5)
  np.testing.assert_allclose(hidden_grad_BTD, hidden.grad, atol=1e-5)
  np.testing.assert_allclose(head_grad_DV, head.grad, atol=1e-5)
