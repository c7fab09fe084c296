# SPDX-License-Identifier: Apache-2.0
"""Ten updates against torch's AdamW and transformers' Adafactor."""

import jax
import numpy as np
import optax
import pytest

from atlas_jax.train import optimizer
from configs import optimizer as optimizers

torch = pytest.importorskip("torch")
optimization = pytest.importorskip("transformers.optimization")

_RATE, _DECAY = 0.01, 0.1


def _draw(seed):
  """Draws a matrix large enough to be factored, and a norm's scale."""
  rng = np.random.default_rng(seed)
  shapes = {"kernel": (160, 130), "scale": (130,)}
  drawn = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
  return {name: x.astype(np.float32) for name, x in drawn.items()}


def _ours(name, max_grad_norm):
  config = optimizers.get_config()
  config.update(
    name=name,
    weight_decay=_DECAY,
    max_grad_norm=max_grad_norm,
    not_decayed=("scale",),
  )
  chain = optimizer.make_optimizer(lambda _: _RATE, **config)
  params = _draw(0)
  state = chain.init(params)
  update = jax.jit(chain.update)
  for seed in range(1, 11):
    updates, state = update(_draw(seed), state, params, step=seed)
    params = optax.apply_updates(params, updates)
  return params


def _theirs(make, max_grad_norm):
  torch.set_num_threads(1)
  params = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in _draw(0).items()}
  reference = make(
    [
      {"params": [params["kernel"]], "weight_decay": _DECAY},
      {"params": [params["scale"]], "weight_decay": 0.0},
    ]
  )
  for seed in range(1, 11):
    for name, grad in _draw(seed).items():
      params[name].grad = torch.tensor(grad)
    if max_grad_norm:
      torch.nn.utils.clip_grad_norm_(params.values(), max_grad_norm)
    reference.step()
  return {name: param.detach().numpy() for name, param in params.items()}


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_adamw_matches_torch(max_grad_norm):
  found = _ours("adamw", max_grad_norm)
  expected = _theirs(
    lambda groups: torch.optim.AdamW(groups, lr=_RATE), max_grad_norm
  )
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, atol=1e-5)


def test_adafactor_matches_transformers():
  found = _ours("adafactor", 0.0)
  expected = _theirs(
    lambda groups: optimization.Adafactor(
      groups, lr=_RATE, scale_parameter=False, relative_step=False
    ),
    0.0,
  )
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, atol=1e-5)
