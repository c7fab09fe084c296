# SPDX-License-Identifier: Apache-2.0
"""Reading of config.json, and fields rejected by name."""

import json
import pathlib

import pytest
from transformers.models.auto import configuration_auto

from atlas_jax import errors
from atlas_jax.models import decoder_config, hf_fields
from tests import tiny

_PUBLISHED = sorted(
  (pathlib.Path(__file__).parents[2] / "golden/configs").glob("*.json")
)


@pytest.mark.parametrize(
  ("family", "qkv_bias", "qk_norm"),
  [("qwen2", True, False), ("qwen3", False, True), ("llama", False, False)],
)
def test_family_decides_biases_and_norms(family, qkv_bias, qk_norm):
  got = decoder_config.from_hf(tiny.fields(family))
  assert (got.qkv_bias, got.qk_norm) == (qkv_bias, qk_norm)


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"model_type": "gpt2"}, "gpt2"),
    ({"model_type": ["llama"]}, "llama"),
    ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
    ({"attention_bias": True}, "attention_bias"),
    ({"use_sliding_window": True, "max_window_layers": 0}, "sliding_window"),
    ({"layer_types": ["sliding_attention"] * 2}, "layer_types"),
    ({"layer_types": ["full_attention"]}, "layer_types"),
    ({"layer_types": [["full_attention"], 1]}, "layer_types"),
    ({"layer_types": 3}, "layer_types"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ({"query_pre_attn_scalar": 6}, "query_pre_attn_scalar"),
    ({"num_experts": 8}, "num_experts"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"is_causal": False}, "is_causal"),
    ({"per_layer_config": {"0": {"head_dim": 4}}}, "per_layer_config"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value"),
    ({"head_dim": 7}, "must be even, got 7"),
    ({"vocab_size": None}, "vocab_size"),
    ({"vocab_size": "37"}, "vocab_size must be a positive integer, got '37'"),
    ({"num_attention_heads": 0}, "num_attention_heads must be"),
    ({"num_hidden_layers": True}, "num_hidden_layers must be"),
    ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ({"rope_parameters": "yarn"}, "rope_parameters"),
    ({"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
    (
      {"rope_parameters": {"rope_type": "default", "rope_theta": "1"}},
      "rope_theta",
    ),
  ],
)
def test_unsupported_fields_are_rejected_by_name(changes, named):
  with pytest.raises(errors.CheckpointError) as caught:
    decoder_config.from_hf(tiny.fields("qwen2", **changes))
  assert named in caught.value.what


def test_all_unsupported_fields_are_named_at_once():
  changes = {"mlp_bias": True, "final_logit_softcapping": 30.0}
  with pytest.raises(errors.CheckpointError) as caught:
    decoder_config.from_hf(tiny.fields("llama", **changes))
  assert all(name in caught.value.what for name in changes)
  assert "ignore_fields" in caught.value.fix


@pytest.mark.parametrize("path", _PUBLISHED, ids=lambda path: path.stem)
def test_published_configs_are_read_as_transformers_reads_them(path):
  fields = json.loads(path.read_text())
  got = decoder_config.from_hf(fields)
  theirs = configuration_auto.CONFIG_MAPPING[got.family](**fields)
  assert got.num_layers == theirs.num_hidden_layers
  assert got.tie_embeddings == theirs.tie_word_embeddings
  width = getattr(theirs, "head_dim", None) or got.width // got.num_heads
  assert got.head_width == width
  ropes = theirs.rope_parameters
  both = [
    ropes.get(kind, ropes) for kind in ("full_attention", "sliding_attention")
  ]
  assert [rope["rope_theta"] for rope in both] == [
    got.rope.theta,
    got.local_rope.theta,
  ]
  window = getattr(theirs, "sliding_window", None)
  default = ["sliding_attention" if window else "full_attention"]
  kinds = getattr(theirs, "layer_types", default * got.num_layers)
  assert got.local == tuple(kind == "sliding_attention" for kind in kinds)
  assert got.window == (window if any(got.local) else None)


_UNREAD = {
  "_model_name_or_path": "me/base",
  "unk_token_id": 0,
  "rope_interleaved": False,
  "is_llama_config": True,
  "transformers.js_config": {"dtype": "q4"},
  "unsloth_version": "2025.4.7",
  "use_mrope": False,
  "auto_map": {"AutoModelForCausalLM": "modeling.Model"},
}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_fields_that_transformers_does_not_read_change_nothing(family):
  fields = tiny.fields(family)
  extra = fields | _UNREAD
  assert decoder_config.from_hf(extra) == decoder_config.from_hf(fields)
  assert decoder_config.unread(fields) == []
  assert decoder_config.unread(extra) == sorted(_UNREAD)


def test_empty_values_of_other_families_fields_are_accepted():
  empty = {
    "attn_logit_softcapping": None,
    "num_experts": 0,
    "norm_topk_prob": False,
    "mlp_only_layers": [],
    "is_causal": True,
    "per_layer_config": None,
  }
  fields = tiny.fields("llama")
  got = decoder_config.from_hf(fields | empty)
  assert got == decoder_config.from_hf(fields)


def test_ignored_fields_count_as_absent():
  fields = tiny.fields("qwen2")
  changes = {"final_logit_softcapping": 30.0, "rope_scaling": {"type": "su"}}
  got = decoder_config.from_hf(fields | changes, ignore_fields=(*changes, "x"))
  assert got == decoder_config.from_hf(fields)
  assert set(got.ignored_fields) == set(changes)
  with pytest.raises(errors.CheckpointError, match="'vocab_size' is missing"):
    decoder_config.from_hf(fields, ignore_fields=("vocab_size",))


def test_every_field_that_transformers_reads_is_handled():
  reads = [family.reads for family in decoder_config._FAMILIES.values()]
  handled = set().union(
    decoder_config._READ,
    decoder_config._NO_EFFECT,
    decoder_config._REQUIRED,
    *reads,
  )
  assert not hf_fields.READ - handled


def test_gemma_3_defaults_to_the_theta_of_its_global_layers():
  fields = tiny.fields("gemma3_text")
  del fields["rope_parameters"]
  got = decoder_config.from_hf(fields)
  assert (got.rope.theta, got.local_rope.theta) == (1_000_000.0, 10_000.0)


@pytest.mark.parametrize("missing", ["factor", "low_freq_factor"])
def test_incomplete_rope_scaling_is_rejected_by_name(missing):
  rope = {k: v for k, v in tiny.LLAMA3_ROPE.items() if k != missing}
  with pytest.raises(errors.CheckpointError, match=missing):
    decoder_config.from_hf(tiny.fields("llama", rope_parameters=rope))


def test_unknown_and_empty_rope_scalings_are_rejected_by_name():
  unknown = {**tiny.LLAMA3_ROPE, "beta_fast": 32.0}
  with pytest.raises(errors.CheckpointError, match="beta_fast"):
    decoder_config.from_hf(tiny.fields("llama", rope_parameters=unknown))
  flat = {**tiny.LLAMA3_ROPE, "high_freq_factor": 1.0}
  with pytest.raises(errors.CheckpointError, match="high_freq_factor"):
    decoder_config.from_hf(tiny.fields("llama", rope_parameters=flat))


def test_older_and_newer_rope_fields_are_equivalent():
  newer = tiny.fields("llama")
  older = tiny.fields("llama")
  rope = dict(older.pop("rope_parameters"))
  older["rope_theta"] = rope.pop("rope_theta")
  older["rope_scaling"] = rope
  assert decoder_config.from_hf(older) == decoder_config.from_hf(newer)


def test_head_width_defaults_depend_on_the_family():
  changes = {"hidden_size": 24, "head_dim": None}
  assert decoder_config.from_hf(tiny.fields("qwen2", **changes)).head_width == 8
  assert decoder_config.from_hf(tiny.fields("llama", **changes)).head_width == 8
  assert (
    decoder_config.from_hf(tiny.fields("qwen3", **changes)).head_width == 128
  )


def _local(family, **changes):
  fields = tiny.fields(family, num_hidden_layers=6, **changes)
  local = decoder_config.from_hf(fields).local
  return "".join("w" if is_local else "f" for is_local in local)


def test_local_layers_are_read_from_each_familys_fields():
  window = {"sliding_window": 9, "layer_types": None}
  switched = {**window, "use_sliding_window": True, "max_window_layers": 4}
  assert _local("gemma2", **window) == "wfwfwf"
  assert _local("gemma3_text", **window) == "wwwwwf"
  assert _local("gemma3_text", **window, sliding_window_pattern=3) == "wwfwwf"
  assert _local("mistral", sliding_window=9) == "wwwwww"
  assert _local("mistral", sliding_window=None) == "ffffff"
  assert _local("qwen2", **switched) == "ffffww"
  assert _local("qwen3", **{**switched, "use_sliding_window": False}) == "f" * 6
  assert _local("llama", sliding_window=9) == "ffffff"


def test_older_and_newer_gemma_ropes_are_equivalent():
  newer = tiny.fields("gemma3_text")
  older = tiny.fields("gemma3_text")
  del older["rope_parameters"]
  older |= {
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
  }
  got = decoder_config.from_hf(older)
  assert got == decoder_config.from_hf(newer)
  assert got.rope != got.local_rope


def test_mixed_dense_and_expert_layers_are_rejected():
  for changes in ({"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}):
    with pytest.raises(errors.CheckpointError, match="experts"):
      decoder_config.from_hf(tiny.fields("qwen3_moe", **changes))
