# SPDX-License-Identifier: Apache-2.0
"""Compares SFT loss and gradient of whole models with transformers."""

import functools

import jax
import numpy as np
import pytest

from atlas_jax.models import decoder
from atlas_jax.train import sft
from conversion import load, rules
from tests import tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

_LENGTHS = (9, 5, 7)


def _reference(directory, family):
  torch.set_num_threads(1)
  torch.manual_seed(0)
  config = transformers.AutoConfig.for_model(**tiny.fields(family))
  config._experts_implementation = "eager"  # The fused one needs even sizes.
  reference = transformers.AutoModelForCausalLM.from_config(config)
  reference.save_pretrained(directory)
  return reference


def _batch(vocab_size):
  """Draws rows of different lengths with a random loss mask."""
  rng = np.random.default_rng(0)
  shape = (len(_LENGTHS), max(_LENGTHS))
  real_BT = np.arange(shape[1]) < np.array(_LENGTHS)[:, None]
  loss_mask_BT = real_BT & (rng.random(shape) < 0.6)
  loss_mask_BT[:, 0] = False
  return {
    "token_ids": np.where(real_BT, rng.integers(3, vocab_size, shape), 0),
    "positions": np.where(real_BT, np.arange(shape[1]), 0),
    "segment_ids": real_BT.astype(np.int32),
    "loss_mask": loss_mask_BT,
  }


@pytest.mark.parametrize(
  ("family", "router_aux_coef"),
  [*((family, 0.0) for family in tiny.FAMILIES), ("qwen3_moe", 0.5)],
)
def test_loss_and_gradient_match_transformers(
  tmp_path, family, router_aux_coef
):
  reference = _reference(tmp_path / "hf", family)
  config, _ = load.read_config(tmp_path / "hf")
  model = decoder.build(
    config, dtype="float32", attention="xla", remat="none", unroll=1
  )
  params = load.load(tmp_path / "hf", model, param_dtype="float32")
  batch = _batch(config.vocab_size)
  labels_BT = np.where(batch["loss_mask"], batch["token_ids"], -100)

  loss_fn = functools.partial(
    sft.packed_loss,
    model,
    z_loss_coef=0.0,
    chunk_tokens=4,
    router_aux_coef=router_aux_coef,
  )
  (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)

  balanced = {}
  if router_aux_coef:
    reference.router_aux_loss_coef = router_aux_coef
    balanced = {"output_router_logits": True}
  expected = reference(
    **balanced,
    input_ids=torch.tensor(batch["token_ids"]),
    attention_mask=torch.tensor(batch["segment_ids"]),
    labels=torch.tensor(labels_BT),
  ).loss
  expected.backward()
  np.testing.assert_allclose(loss, expected.item(), atol=1e-5)
  flat = dict(rules.flatten(grads))
  for piece in rules.pieces(model):
    wanted = _gradient(reference, piece.name)
    got = rules.to_hf(
      piece.rule, np.asarray(flat[piece.rule.path][piece.index])
    )
    wanted = wanted[piece.start : piece.stop]
    np.testing.assert_allclose(got, wanted, atol=1e-5, err_msg=piece.name)


def _gradient(reference, name):
  """Returns a gradient; transformers fuses experts in memory only."""
  if "experts" not in name:
    return reference.get_parameter(name).grad.numpy()
  module, rest = name.split("experts.")
  expert, projection, _ = rest.split(".")
  experts = reference.get_submodule(module + "experts")
  if projection == "down_proj":
    return experts.down_proj.grad[int(expert)].numpy()
  gate, up = experts.gate_up_proj.grad[int(expert)].chunk(2)
  return (gate if projection == "gate_proj" else up).numpy()
