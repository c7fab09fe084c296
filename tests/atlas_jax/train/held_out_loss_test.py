# SPDX-License-Identifier: Apache-2.0
"""Tests that held-out losses are evaluated in microbatches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.losses import reduce
from atlas_jax.train import held_out_loss

_ROWS, _TOKENS = 8, 5


def _batch(seed):
  x_key, mask_key = jax.random.split(jax.random.key(seed))
  mask_BT = jax.random.bernoulli(mask_key, 0.5, (_ROWS, _TOKENS))
  return {
    "x": jax.random.normal(x_key, (_ROWS, _TOKENS)),
    # Of four microbatches, number 2 has no tokens.
    "mask": mask_BT.at[2::4].set(False),
  }


@pytest.mark.parametrize("num_microbatches", [1, 2, 4])
def test_microbatches_have_the_mean_of_all_tokens(num_microbatches):
  shapes = []

  def loss_fn(params, batch):
    shapes.append(batch["x"].shape)
    square_BT = jnp.square(params * batch["x"])
    loss = reduce.token_mean(square_BT, batch["mask"])
    return loss, (jnp.sum(batch["mask"]), {"loss": loss})

  batches = [_batch(seed) for seed in (0, 1)]
  held_out = held_out_loss.make(loss_fn)
  for _ in range(2):  # The second evaluation compiles nothing.
    found = held_out(
      2.0, ((batch, None, num_microbatches) for batch in batches)
    )
  x, mask = (np.stack([b[name] for b in batches]) for name in ("x", "mask"))
  assert found == {
    "eval/loss": pytest.approx(np.mean((2.0 * x[mask]) ** 2), rel=1e-6)
  }
  assert set(shapes) == {(_ROWS // num_microbatches, _TOKENS)}


def test_batches_without_tokens_have_a_loss_of_zero():
  held_out = held_out_loss.make(
    lambda params, batch: (params, (jnp.sum(batch["mask"]), {"loss": params}))
  )
  batch = {"mask": jnp.zeros((_ROWS, _TOKENS), bool)}
  assert held_out(3.0, [(batch, None, 2)]) == {"eval/loss": 0.0}
