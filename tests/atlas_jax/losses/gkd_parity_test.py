# SPDX-License-Identifier: Apache-2.0
"""Divergence against TRL, on one masked batch of logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.losses import gkd, reduce

torch = pytest.importorskip("torch")
gkd_trainer = pytest.importorskip("trl.experimental.gkd.gkd_trainer")

_B, _T, _V = 3, 11, 59
_IGNORED = -100


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_loss_and_gradient_match_trl(beta, temperature):
  rng = np.random.default_rng(0)
  student_BTV, teacher_BTV = 2.0 * rng.normal(size=(2, _B, _T, _V)).astype(
    np.float32
  )
  mask_BT = rng.random((_B, _T)) < 0.6
  logits = torch.tensor(student_BTV, requires_grad=True)
  want = gkd_trainer.GKDTrainer.generalized_jsd_loss(
    logits,
    torch.tensor(teacher_BTV),
    labels=torch.tensor(np.where(mask_BT, 1, _IGNORED)),
    beta=beta,
    temperature=temperature,
    reduction="batchmean",
  )
  want.backward()

  def loss(student_BTV):
    divergence_BT = gkd.generalized_jsd(
      student_BTV,
      jnp.asarray(teacher_BTV),
      beta=beta,
      temperature=temperature,
    )
    return reduce.token_mean(divergence_BT, jnp.asarray(mask_BT))

  got, grad_BTV = jax.value_and_grad(loss)(jnp.asarray(student_BTV))
  np.testing.assert_allclose(got, want.item(), atol=1e-5)
  np.testing.assert_allclose(grad_BTV, logits.grad, atol=1e-5)
