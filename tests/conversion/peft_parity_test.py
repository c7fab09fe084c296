# SPDX-License-Identifier: Apache-2.0
"""Adapters against PEFT: logits, gradients and the directory it opens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.models import decoder, lora
from conversion import load, peft_adapters
from tests import tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

_LORA = lora.Lora(
  rank=3, alpha=7.0, targets=("attention/[qkvo]", "mlp/(gate|up|down)")
)


def _draw(model):
  """Draws adapters in which B is not zero."""
  adapters = lora.only(lora.adapt(model, _LORA).abstract_params)
  return jax.tree.map(
    lambda leaf: 0.2 * jax.random.normal(jax.random.key(5), leaf.shape),
    adapters,
  )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma3_text"])
def test_logits_and_gradients_equal_those_of_peft(tmp_path, family):
  torch.set_num_threads(1)
  torch.manual_seed(0)
  config = transformers.AutoConfig.for_model(**tiny.fields(family))
  reference = transformers.AutoModelForCausalLM.from_config(config)
  reference.save_pretrained(tmp_path / "base")
  shape, _ = load.read_config(tmp_path / "base")
  model = decoder.build(shape, dtype="float32", remat="none", unroll=1)
  params = load.load(tmp_path / "base", model, param_dtype="float32")
  adapters = _draw(model)
  target = tmp_path / "adapter"
  peft_adapters.save(target, adapters, model, settings=_LORA, base="base")
  theirs = peft.PeftModel.from_pretrained(reference, target, is_trainable=True)
  batch = tiny.batch(model)

  def loss(adapters):
    tree = lora.join(params, adapters)
    logits_BTV = lora.adapt(model, _LORA).logits(tree, *batch)
    return jnp.mean(jax.nn.logsumexp(logits_BTV, -1) ** 2), logits_BTV

  (_, logits_BTV), grads = jax.value_and_grad(loss, has_aux=True)(adapters)
  expected_BTV = theirs(torch.tensor(np.asarray(batch[0]))).logits
  (expected_BTV.logsumexp(-1) ** 2).mean().backward()

  np.testing.assert_allclose(
    logits_BTV, expected_BTV.detach().numpy(), atol=1e-4, rtol=0
  )
  expected = {
    name.replace(".default", ""): parameter.grad.numpy()
    for name, parameter in theirs.named_parameters()
    if parameter.requires_grad
  }
  got = peft_adapters.tensors(grads, model)
  assert got.keys() == expected.keys()
  for name, grad in got.items():
    assert np.abs(grad).max() > 1e-4
    np.testing.assert_allclose(grad, expected[name], atol=1e-5, rtol=1e-3)


def test_adapters_of_fused_projections_are_refused(tmp_path):
  model = tiny.build("phi3")
  with pytest.raises(ValueError, match="no names for phi3"):
    peft_adapters.save(
      tmp_path / "a", _draw(model), model, settings=_LORA, base=""
    )
