# SPDX-License-Identifier: Apache-2.0
"""The checks of an export detect what they are meant to detect."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax import errors
from conversion import rules, verify
from tests import tiny


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_matches_live_parameters(tmp_path, dtype):
  model, params = tiny.write_checkpoint(tmp_path / "hf", "qwen3", dtype=dtype)
  difference = verify.logits_equal(
    tmp_path / "hf", params, model, tolerance=1e-6
  )
  assert difference <= 1e-6


@pytest.mark.parametrize("value", [2.0, np.nan])
def test_different_parameters_are_detected(tmp_path, value):
  model, params = tiny.write_checkpoint(tmp_path / "hf", "qwen2")
  kernel = params["layers"]["attention"]["o"]["kernel"]
  params["layers"]["attention"]["o"]["kernel"] = kernel.at[1].multiply(value)
  with pytest.raises(errors.CheckpointError, match="first after layer 1"):
    verify.logits_equal(tmp_path / "hf", params, model, tolerance=1e-3)


def _table(error):
  """Parses the report: largest difference and divergence by layer."""
  rows = [line.split(maxsplit=2) for line in error.why.splitlines()[2:]]
  return {name: (float(gap), float(kl)) for gap, kl, name in rows}


def test_wrong_rule_is_located_and_measured(tmp_path, monkeypatch):
  right = rules.to_hf

  def wrong(rule, array):
    kernel = "attention/k/kernel" in rule.path
    return right(rule, array[..., ::-1] if kernel else array)

  monkeypatch.setattr(rules, "to_hf", wrong)
  model, params = tiny.write_checkpoint(tmp_path / "hf", "qwen2")
  monkeypatch.undo()
  with pytest.raises(
    errors.CheckpointError, match="first after layer 0"
  ) as caught:
    verify.logits_equal(tmp_path / "hf", params, model, tolerance=1e-4)
  table = _table(caught.value)
  assert list(table) == ["the embedding", "layer 0", "layer 1"]
  assert table["the embedding"] == (0.0, 0.0)
  assert all(min(table[f"layer {i}"]) > 0.0 for i in range(2))
  # After the last layer, the divergence is that of the model's logits.
  text = f"KL divergence is {table['layer 1'][1]:.3g} nats"
  assert text in caught.value.why


def test_wrong_head_shows_only_in_the_divergence(tmp_path):
  model, params = tiny.write_checkpoint(tmp_path / "hf", "gemma2")
  scale = params["final_norm"]["scale"]
  params["final_norm"]["scale"] = scale.at[0].add(0.5)
  with pytest.raises(errors.CheckpointError, match="are equal") as caught:
    verify.logits_equal(tmp_path / "hf", params, model, tolerance=1e-4)
  gaps, divergences = zip(*_table(caught.value).values(), strict=True)
  assert not any(gaps)
  assert min(divergences) > 0.0


def test_divergence_is_the_mean_kl():
  model = tiny.build("qwen2")
  sides = [(model, tiny.params_of(model, seed)) for seed in (0, 1)]
  p, q = (
    jax.nn.softmax(model.logits(params, *verify._batch(model)))
    for model, params in sides
  )
  p, q = (np.asarray(each, np.float64) for each in (p, q))
  expected = (p * np.log(p / q)).sum(-1).mean()
  gap = verify.logit_gap(*sides)
  np.testing.assert_allclose(gap.divergence, expected, rtol=1e-5)
  assert verify.logit_gap(sides[0], sides[0]) == (0.0, 0.0)


def test_differing_tensors_are_listed(tmp_path):
  tiny.write_checkpoint(tmp_path / "a", "qwen2")
  tiny.write_checkpoint(tmp_path / "b", "qwen2", shard=3000)
  tiny.write_checkpoint(tmp_path / "c", "llama")
  tiny.write_checkpoint(tmp_path / "d", "qwen2", dtype="bfloat16")
  assert tiny.differing(tmp_path / "a", tmp_path / "b") == []
  biases = tiny.differing(tmp_path / "a", tmp_path / "c")
  assert "model.layers.0.self_attn.q_proj.bias" in biases
  assert len(tiny.differing(tmp_path / "a", tmp_path / "d")) == 27


def test_copy_has_the_shardings_of_the_live_parameters(tmp_path):
  model, params = tiny.write_checkpoint(tmp_path / "hf", "llama")
  other = jax.devices()[3]
  moved = jax.device_put(params, other)
  with jax.default_device(other):
    verify.logits_equal(tmp_path / "hf", moved, model, tolerance=0.0)
  assert jnp.isfinite(moved["embed"]["embedding"]).all()
