# SPDX-License-Identifier: Apache-2.0
"""Tiny GGUF files, written as llama.cpp's `convert_hf_to_gguf.py` does."""

import json

import gguf
import numpy as np

from conversion import weights
from tests import tiny

_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
# transformers' loader of GGUF files does not read all metadata: it takes these
# published values for head widths, soft caps and the width of experts.
_OWN = {
  "llama": {"rope_parameters": _ROPE},
  "qwen2": {},
  "qwen3": {"head_dim": 128},
  "qwen3_moe": {"moe_intermediate_size": 768},
  "phi3": {"rope_parameters": _ROPE},
  "gemma2": {
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
  },
  "gemma3_text": {
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    "rope_parameters": {
      "sliding_attention": _ROPE,
      "full_attention": {**_ROPE, "rope_theta": 1_000_000.0},
    },
  },
}
FAMILIES = tuple(_OWN)
_NAMES = {"qwen3_moe": "qwen3moe", "gemma3_text": "gemma3"}
_CONTROL, _NORMAL = 3, 1


def write_source(directory, family, **changes):
  """Writes a random model in Hugging Face format that GGUF can express."""
  sizes = {
    "head_dim": 6,
    "initializer_range": 0.02,  # GGUF does not have it.
    "tie_word_embeddings": "gemma" in family,
  }
  return tiny.write_talker(
    directory, family, **{**sizes, **_OWN[family], **changes}
  )


def write(path, source, *, pre="qwen2", extra=None, tensors=None, kind="F32"):
  """Writes a Hugging Face directory as a GGUF file.

  `extra` adds metadata, `tensors` adds tensors, `kind` is that of matrices.
  """
  fields = json.loads((source / "config.json").read_text())
  architecture = _NAMES.get(fields["model_type"], fields["model_type"])
  writer = gguf.GGUFWriter(path, architecture)
  _add_config(writer, fields)
  _add_tokenizer(writer, source, pre)
  for key, value in (extra or {}).items():
    write_one = {str: writer.add_string, int: writer.add_uint32}
    write_one.get(type(value), writer.add_float32)(key, value)
  arch = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
  table = gguf.get_tensor_name_map(
    arch[architecture], fields["num_hidden_layers"]
  )
  held = {**_values(source, fields, table), **(tensors or {})}
  for name, value in held.items():
    stored = gguf.GGMLQuantizationType[kind if value.ndim > 1 else "F32"]
    packed = gguf.quantize(np.ascontiguousarray(value, np.float32), stored)
    writer.add_tensor(name, packed, raw_dtype=stored)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def _values(source, fields, table):
  """Returns the tensors by GGUF's names, transformed as the converter does."""
  held, experts = {}, {}
  for name, weight in weights.of_directory(source).items():
    value = weight.read()
    if fields["model_type"] == "llama" and "q_proj" in name:
      value = _permuted(value, fields["num_attention_heads"])
    if fields["model_type"] == "llama" and "k_proj" in name:
      value = _permuted(value, fields["num_key_value_heads"])
    if "gemma" in fields["model_type"] and name.endswith("norm.weight"):
      value = value + 1
    stem, _, suffix = name.rpartition(".")
    before, _, after = stem.partition(".experts.")
    if after:  # Experts are in order.
      merged = f"{before}.experts.{after.split('.')[1]}"
      experts.setdefault(f"{table.get_name(merged)}.{suffix}", []).append(value)
    else:
      held[f"{table.get_name(stem)}.{suffix}"] = value
  return held | {name: np.stack(values) for name, values in experts.items()}


def _permuted(value, num_heads):
  """The converter's `permute`, quoted; its reshape splits halves first."""
  return (
    value.reshape(
      num_heads, 2, value.shape[0] // num_heads // 2, *value.shape[1:]
    )
    .swapaxes(1, 2)
    .reshape(value.shape)
  )


def _add_config(writer, fields):
  writer.add_context_length(fields["max_position_embeddings"])
  writer.add_embedding_length(fields["hidden_size"])
  writer.add_block_count(fields["num_hidden_layers"])
  writer.add_feed_forward_length(fields["intermediate_size"])
  writer.add_head_count(fields["num_attention_heads"])
  writer.add_head_count_kv(fields["num_key_value_heads"])
  writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
  writer.add_key_length(fields["head_dim"])
  writer.add_value_length(fields["head_dim"])
  ropes = fields["rope_parameters"]
  writer.add_rope_freq_base(ropes.get("full_attention", ropes)["rope_theta"])
  writer.add_rope_dimension_count(fields["head_dim"])
  if fields.get("sliding_window"):
    writer.add_sliding_window(fields["sliding_window"])
  if fields.get("attn_logit_softcapping"):
    writer.add_attn_logit_softcapping(fields["attn_logit_softcapping"])
    writer.add_final_logit_softcapping(fields["final_logit_softcapping"])
  if "num_experts" in fields:
    writer.add_expert_count(fields["num_experts"])
    writer.add_expert_used_count(fields["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(fields["moe_intermediate_size"])


def _add_tokenizer(writer, source, pre):
  stored = json.loads((source / "tokenizer.json").read_text())
  tokens = sorted(
    stored["model"]["vocab"], key=stored["model"]["vocab"].__getitem__
  )
  special = {each["content"] for each in stored["added_tokens"]}
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre(pre)
  writer.add_token_list(tokens)
  writer.add_token_types(
    [_CONTROL if token in special else _NORMAL for token in tokens]
  )
  writer.add_token_merges(
    [" ".join(pair) for pair in stored["model"]["merges"]]
  )
  writer.add_eos_token_id(tokens.index("<|im_end|>"))
  writer.add_pad_token_id(tokens.index("<|endoftext|>"))
  writer.add_chat_template((source / "chat_template.jinja").read_text())
