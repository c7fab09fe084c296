# SPDX-License-Identifier: Apache-2.0
"""Parity with PEFT: logits, gradients and directory format."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax import errors
from atlas_jax.models import decoder, lora
from conversion import card, load, peft_adapters, shards
from scripts import convert
from tests import tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# PEFT calls a deprecated function of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
_LORA = lora.Lora(
  rank=3, alpha=7.0, targets=("attention/[qkvo]", "mlp/(gate|up|down)")
)


def _draw(model):
  """Returns random adapters with a non-zero B."""
  adapters = lora.only(lora.adapt(model, _LORA).abstract_params)
  return jax.tree.map(
    lambda leaf: 0.2 * jax.random.normal(jax.random.key(5), leaf.shape),
    adapters,
  )


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma3_text"])
def test_logits_and_gradients_match_peft(tmp_path, family):
  torch.set_num_threads(1)
  torch.manual_seed(0)
  config = transformers.AutoConfig.for_model(**tiny.fields(family))
  reference = transformers.AutoModelForCausalLM.from_config(config)
  reference.save_pretrained(tmp_path / "base")
  shape, _ = load.read_config(tmp_path / "base")
  model = decoder.build(
    shape, dtype="float32", attention="xla", remat="none", unroll=1
  )
  params = load.load(tmp_path / "base", model, param_dtype="float32")
  adapters = _draw(model)
  target = tmp_path / "adapter"
  _save(target, adapters, model, tmp_path / "base")
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


def _save(directory, adapters, model, source, settings=_LORA):
  peft_adapters.save_directory(
    directory,
    adapters,
    model,
    settings=settings,
    source=source,
    about=card.Card(base="base"),
  )


def _write_theirs(directory, family, *, dtype="float32", **changes):
  """Writes a base and an adapter with PEFT; returns the adapted model."""
  torch.set_num_threads(1)
  torch.manual_seed(0)
  config = transformers.AutoConfig.for_model(**tiny.fields(family))
  config._experts_implementation = "eager"  # The fused kernel needs even sizes.
  base = transformers.AutoModelForCausalLM.from_config(config)
  base = base.to(getattr(torch, dtype))
  base.save_pretrained(directory / "base")
  (directory / "base" / "tokenizer.json").write_text("{}")
  targets = "all-linear"
  if family == "qwen3_moe":  # Otherwise PEFT adapts the experts too.
    targets = [f"{each}_proj" for each in "qkvo"]
  settings = {"r": 3, "lora_alpha": 7, "target_modules": targets}
  settings = peft.LoraConfig(**settings, task_type="CAUSAL_LM", **changes)
  theirs = peft.get_peft_model(base, settings)
  with torch.no_grad():
    for name, parameter in theirs.named_parameters():
      if "lora_" in name:
        parameter.copy_(0.2 * torch.randn_like(parameter))
  theirs.save_pretrained(directory / "adapter")
  return theirs


@pytest.mark.parametrize(
  ("family", "dtype", "rslora"),
  [
    ("qwen3", "float32", False),
    ("qwen3", "bfloat16", False),
    ("gemma2", "float32", True),
    ("phi3", "float32", False),
  ],
)
def test_merged_weights_match_peft(tmp_path, family, dtype, rslora):
  theirs = _write_theirs(tmp_path, family, dtype=dtype, use_rslora=rslora)
  flags = (f"--{n}={tmp_path / n}" for n in ("base", "adapter", "output"))

  assert convert.main(["merge", *flags]) == 0

  expected = theirs.merge_and_unload().state_dict()
  got = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "output")
  changed = shards.open_directory(tmp_path / "base")
  for name, tensor in got.state_dict().items():
    # PEFT rounds the product to bfloat16 before adding it.
    atol, rtol = (1e-6, 0) if dtype == "float32" else (2e-2, 2e-2)
    np.testing.assert_allclose(
      tensor.float(), expected[name].float(), atol=atol, rtol=rtol
    )
    if "_proj" in name:
      before = shards.read(changed[name]).astype(np.float32)
      assert np.abs(tensor.float().numpy() - before).max() > 0.1


@pytest.mark.parametrize(
  "family", [family for family in tiny.FAMILIES if family != "phi3"]
)
def test_peft_adapters_round_trip_through_training(tmp_path, family):
  theirs = _write_theirs(tmp_path, family, use_rslora=True)
  shape, _ = load.read_config(tmp_path / "base")
  model = decoder.build(
    shape, dtype="float32", attention="xla", remat="none", unroll=1
  )
  params = load.load(tmp_path / "base", model, param_dtype="float32")
  targets = ("attention/[qkvo]",) if model.config.experts else _LORA.targets
  settings = lora.Lora(rank=3, alpha=7 * math.sqrt(3), targets=targets)
  batch = tiny.batch(model)

  adapters = peft_adapters.load(tmp_path / "adapter", model, settings)

  got = lora.adapt(model, settings).logits(lora.join(params, adapters), *batch)
  tokens_BT = torch.tensor(np.asarray(batch[0]))
  expected = theirs(tokens_BT).logits.detach().numpy()
  np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)
  _save(tmp_path / "ours", adapters, model, tmp_path / "base", settings)
  base = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "base", experts_implementation="eager"
  )
  again = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
  np.testing.assert_allclose(
    again(tokens_BT).logits.detach().numpy(), expected, atol=1e-5, rtol=0
  )


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"use_dora": True}, "use_dora=True"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
    ({"bias": "all"}, "bias='all'"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern="),
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
  ],
)
def test_unsupported_settings_are_rejected(tmp_path, changes, message):
  _write_theirs(tmp_path, "llama", **changes)
  with pytest.raises(errors.CheckpointError, match=message):
    peft_adapters.open_directory(tmp_path / "adapter")


def test_adapters_of_fused_projections_are_rejected(tmp_path):
  model = tiny.build("phi3")
  with pytest.raises(errors.ConfigError, match="adapters of phi3"):
    _save(tmp_path / "a", _draw(model), model, tmp_path)
