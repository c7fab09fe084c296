# SPDX-License-Identifier: Apache-2.0
"""What a config means, and what is refused by name."""

import pytest

from atlas_jax import errors
from atlas_jax.models import config
from tests import tiny


@pytest.mark.parametrize(
  ("family", "qkv_bias", "qk_norm"),
  [("qwen2", True, False), ("qwen3", False, True), ("llama", False, False)],
)
def test_family_decides_biases_and_norms(family, qkv_bias, qk_norm):
  got = config.from_hf(tiny.fields(family))
  assert (got.qkv_bias, got.qk_norm) == (qkv_bias, qk_norm)


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"model_type": "gpt2"}, "gpt2"),
    ({"model_type": ["llama"]}, "llama"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"attention_bias": True}, "attention_bias"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"layer_types": ["sliding_attention"]}, "layer_types"),
    ({"layer_types": 3}, "layer_types"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"auto_map": {"AutoModel": "code.Model"}}, "auto_map"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value"),
    ({"head_dim": 7}, "head_dim=7"),
    ({"vocab_size": None}, "vocab_size"),
    ({"vocab_size": "37"}, "vocab_size='37'"),
    ({"num_attention_heads": 0}, "num_attention_heads=0"),
    ({"num_hidden_layers": True}, "num_hidden_layers=True"),
    ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ({"rope_parameters": "yarn"}, "rope_parameters"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    (
      {"rope_parameters": {"rope_type": "default", "rope_theta": "1"}},
      "rope_theta",
    ),
  ],
)
def test_what_cannot_be_computed_is_refused_by_name(changes, named):
  with pytest.raises(errors.CheckpointError) as caught:
    config.from_hf(tiny.fields("qwen2", **changes))
  assert named in caught.value.why


@pytest.mark.parametrize("missing", ["factor", "low_freq_factor"])
def test_incomplete_rope_scaling_is_refused_by_name(missing):
  rope = {k: v for k, v in tiny.LLAMA3_ROPE.items() if k != missing}
  with pytest.raises(errors.CheckpointError, match=missing):
    config.from_hf(tiny.fields("llama", rope_parameters=rope))


def test_unknown_and_flat_rope_scalings_are_refused_by_name():
  unknown = {**tiny.LLAMA3_ROPE, "beta_fast": 32.0}
  with pytest.raises(errors.CheckpointError, match="beta_fast"):
    config.from_hf(tiny.fields("llama", rope_parameters=unknown))
  flat = {**tiny.LLAMA3_ROPE, "high_freq_factor": 1.0}
  with pytest.raises(errors.CheckpointError, match="high_freq_factor"):
    config.from_hf(tiny.fields("llama", rope_parameters=flat))


def test_older_and_newer_rope_fields_mean_the_same():
  newer = tiny.fields("llama")
  older = tiny.fields("llama")
  rope = dict(older.pop("rope_parameters"))
  older["rope_theta"] = rope.pop("rope_theta")
  older["rope_scaling"] = rope
  assert config.from_hf(older) == config.from_hf(newer)


def test_head_width_falls_back_as_each_family_has_it():
  changes = {"hidden_size": 24, "head_dim": None}
  assert config.from_hf(tiny.fields("qwen2", **changes)).head_width == 8
  assert config.from_hf(tiny.fields("llama", **changes)).head_width == 8
  assert config.from_hf(tiny.fields("qwen3", **changes)).head_width == 128
