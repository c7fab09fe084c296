# SPDX-License-Identifier: Apache-2.0
"""Tests that transformers and PEFT load exports of trained models."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax import sharding
from atlas_jax.data import sets
from atlas_jax.train import loop, sft
from configs.run import teacher_sft
from scripts.job import components, exports
from tests import fakes, tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Every axis divides over eight devices.
_SHAPE = {
  "vocab_size": 304,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "eos_token_id": 2,
}


def _config(tmp_path):
  config = teacher_sft.get_config("smoke")
  config.world.directory = ""
  config.model.path = str(tmp_path / "start")
  config.data.path = str(tmp_path / "sft.jsonl")
  config.held_out.fraction = 0.25
  config.batch.size = 8
  config.num_epochs = 0
  config.loop.num_steps = 4
  config.loop.log_every = 1
  return config


def _write_data(path):
  rows = [
    {"question": f"What is {n} + {n}?", "solution": f"The answer is {2 * n}."}
    for n in range(64)
  ]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _train(tmp_path, family, **changes):
  """Trains and exports; returns the model and the exported parameters."""
  torch.set_num_threads(1)
  tiny.write_checkpoint(tmp_path / "start", family, **_SHAPE)
  fakes.write_tokenizer(tmp_path / "start")
  _write_data(tmp_path / "sft.jsonl")
  config = _config(tmp_path)
  config.update_from_flattened_dict(changes)
  mesh = sharding.make_mesh(**config.mesh)
  base = components.open_model(mesh, **config.model)
  policy, params = components.open_policy(base, mesh, seed=0, **config.lora)
  train_set, eval_set = sets.conversations(
    base.tokenizer,
    data=sets.Selection(**config.data),
    held_out=sets.HeldOut(**config.held_out),
    layout=sets.Layout(**config.packing),
    batch_size=8,
    seed=0,
    workdir=tmp_path,
  )

  params = sft.train(
    policy,
    params,
    train_set=train_set,
    eval_set=eval_set,
    mesh=mesh,
    config=config,
    run=loop.Run(tmp_path, components.open_writer(tmp_path, config)),
  )
  exports.write(tmp_path, base, policy, params, None, facts={}, **config.export)
  return base, policy.merged_params(params), mesh


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_transformers_loads_trained_models(tmp_path, family):
  base, params, mesh = _train(tmp_path, family)
  export = tmp_path / "export"

  # Exported weights must differ from the initial ones.
  assert tiny.differing(tmp_path / "start", export)
  opened, report = transformers.AutoModelForCausalLM.from_pretrained(
    export, output_loading_info=True
  )
  assert not any(report.values()), report
  tokenizer = transformers.AutoTokenizer.from_pretrained(export)
  messages = [{"role": "user", "content": "What is 12 + 12?"}]
  prompt = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=False
  )
  tokens_BT = np.asarray([prompt])
  with torch.no_grad():
    expected = opened(torch.tensor(tokens_BT)).logits.numpy()
  positions_BT = jnp.arange(len(prompt))[None]
  got = jax.jit(base.model.logits)(
    jax.device_put(params, sharding.replicated(mesh)),
    tokens_BT,
    positions_BT,
    jnp.ones_like(positions_BT),
  )
  assert np.abs(expected).max() > 0.5  # Small logits would agree trivially.
  np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_peft_adapters_match_the_merged_export(tmp_path):
  peft = pytest.importorskip("peft")
  _train(tmp_path, "qwen3", **{"lora.rank": 3})
  load = transformers.AutoModelForCausalLM.from_pretrained
  adapted = peft.PeftModel.from_pretrained(
    load(tmp_path / "start"), tmp_path / "adapter"
  )
  tokens_BT = torch.arange(5, 25)[None]
  with torch.no_grad():
    start, merged, got = (
      model(tokens_BT).logits.numpy()
      for model in (
        load(tmp_path / "start"),
        load(tmp_path / "export"),
        adapted,
      )
    )
  assert np.abs(merged - start).max() > 1e-2
  np.testing.assert_allclose(got, merged, atol=1e-4, rtol=0)
