# SPDX-License-Identifier: Apache-2.0
"""Parity with transformers: files and logits."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.models import decoder
from conversion import card, load, save, shards
from tests import tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# For logits that transformers computes on the CPU in float32.
_TOLERANCE = 1e-4


def _reference(family, dtype="float32", **changes):
  """Returns a transformers model with non-trivial biases and norms."""
  torch.set_num_threads(1)
  torch.manual_seed(0)
  config = transformers.AutoConfig.for_model(**tiny.fields(family, **changes))
  # The grouped matmul needs sizes that are multiples of four.
  config._experts_implementation = "eager"
  reference = transformers.AutoModelForCausalLM.from_config(config)
  with torch.no_grad():
    for parameter in reference.parameters():
      if parameter.ndim == 1:
        parameter.add_(0.3 * torch.randn_like(parameter))
  return reference.to(getattr(torch, dtype)).eval()


def _write(reference, directory, **kwargs):
  reference.save_pretrained(directory, **kwargs)
  (directory / "tokenizer.json").write_text("{}")
  return directory


def _load(directory, param_dtype="float32"):
  config, _ = load.read_config(directory)
  model = decoder.build(
    config, dtype="float32", attention="xla", remat="none", unroll=1
  )
  return model, load.load(directory, model, param_dtype=param_dtype)


def _export(directory, source, model, params, dtype="float32", shard=10**9):
  save.save(
    directory,
    params,
    model,
    source=source,
    dtype=dtype,
    max_shard_bytes=shard,
    about=card.Card(base="test"),
    overwrite=False,
  )
  return directory


def _reference_logits(reference, tokens_BT):
  with torch.no_grad():
    return reference(torch.tensor(np.asarray(tokens_BT))).logits.numpy()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_match_transformers(tmp_path, family, tied):
  reference = _reference(family, tie_word_embeddings=tied)
  model, params = _load(_write(reference, tmp_path / "hf"))
  # Far beyond the 16 positions after which Llama's scaling applies.
  tokens_BT, positions_BT, segments_BT = tiny.batch(model, num_tokens=70)

  got = model.logits(params, tokens_BT, positions_BT, segments_BT)

  expected = _reference_logits(reference, tokens_BT)
  assert np.abs(expected).max() > 0.5  # Small logits would agree trivially.
  np.testing.assert_allclose(got, expected, atol=_TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_query_heads_share_the_same_key_heads(tmp_path, family):
  changes = {
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
  }
  reference = _reference(family, **changes)
  model, params = _load(_write(reference, tmp_path / "hf"))
  batch = tiny.batch(model)

  got = model.logits(params, *batch)

  expected = _reference_logits(reference, batch[0])
  np.testing.assert_allclose(got, expected, atol=_TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_import_then_export_preserves_bits(tmp_path, family, dtype):
  source = _write(_reference(family, dtype), tmp_path / "hf")
  model, params = _load(source)

  _export(tmp_path / "out", source, model, params, dtype)

  assert tiny.differing(source, tmp_path / "out") == []


@pytest.mark.parametrize(
  ("family", "tied"), [("qwen2", True), ("qwen3", False), ("llama", False)]
)
def test_transformers_loads_an_export(tmp_path, family, tied):
  source = _write(_reference(family, tie_word_embeddings=tied), tmp_path / "hf")
  model, _ = _load(source)
  params = tiny.params_of(model)
  batch = tiny.batch(model)

  _export(tmp_path / "out", source, model, params, shard=4000)

  assert (tmp_path / "out" / shards.INDEX_NAME).exists()
  opened, report = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "out", output_loading_info=True
  )
  assert not any(report.values()), report
  expected = _reference_logits(opened, batch[0])
  got = model.logits(params, *batch)
  np.testing.assert_allclose(got, expected, atol=_TOLERANCE, rtol=0)


def test_sharded_files_equal_a_single_file(tmp_path):
  reference = _reference("qwen2")
  single = _write(reference, tmp_path / "single")
  sharded = _write(reference, tmp_path / "sharded", max_shard_size="8KB")
  assert len(list(sharded.glob("*.safetensors"))) > 2

  _, params = _load(single)
  _, others = _load(sharded)

  assert tiny.differing(single, sharded) == []
  for name in ("embed", "final_norm"):
    for key, value in params[name].items():
      np.testing.assert_array_equal(value, others[name][key])


def test_config_keeps_every_field_of_the_source(tmp_path):
  source = _write(_reference("qwen3"), tmp_path / "hf")
  model, params = _load(source)

  _export(tmp_path / "out", source, model, params, "bfloat16")

  before = json.loads((source / "config.json").read_text())
  after = json.loads((tmp_path / "out" / "config.json").read_text())
  assert after == {**before, "dtype": "bfloat16"}


def test_parameters_may_be_bfloat16(tmp_path):
  source = _write(_reference("llama", "bfloat16"), tmp_path / "hf")
  model, params = _load(source, "bfloat16")

  _export(tmp_path / "out", source, model, params, "bfloat16")

  assert params["embed"]["embedding"].dtype == jnp.bfloat16
  assert tiny.differing(source, tmp_path / "out") == []
