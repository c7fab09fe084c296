# SPDX-License-Identifier: Apache-2.0
"""Balance loss against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.models import layers
from tests import tiny

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


def test_balance_loss_matches_transformers():
  from transformers.models.qwen3_moe import modeling_qwen3_moe

  model = tiny.build("qwen3_moe", num_hidden_layers=1)
  params = tiny.params_of(model)
  tokens, positions, segments = tiny.batch(model, num_tokens=12)
  segments = segments.at[1, 7:].set(0)

  _, got = model.hidden_and_balance(params, tokens, positions, segments)

  logits = _router_logits(model, params, tokens, positions, segments)
  expected = modeling_qwen3_moe.load_balancing_loss_func(
    (torch.tensor(np.asarray(logits)),),
    num_experts=5,
    top_k=2,
    attention_mask=torch.tensor(np.asarray(segments)),
  )
  np.testing.assert_allclose(got, expected.item(), rtol=1e-5)


def _router_logits(model, params, tokens, positions, segments):
  """Recomputes the router inputs of a one-layer model."""
  seen = []

  def spy(x):
    seen.append(x)

  original = layers.Linear.__call__

  def call(self, x):
    y = original(self, x)
    if y.shape[-1] == 5:
      jax.debug.callback(spy, y)
    return y

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(layers.Linear, "__call__", call)
    model.hidden(params, tokens, positions, segments)
    jax.effects_barrier()
  return jnp.asarray(seen[0]).reshape(-1, 5)
