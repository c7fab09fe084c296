# SPDX-License-Identifier: Apache-2.0
"""Reads the metadata of a GGUF file as the fields of a `config.json`.

GGUF's names are those of llama.cpp's `gguf-py/gguf/constants.py`. Like a field
of `config.json`, a key that is not known here is rejected by name.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from atlas_jax import errors
from atlas_jax.models import rope

# `model_type` by GGUF's `general.architecture`; Mistral's files say llama.
FAMILIES = {
  "llama": "llama",
  "qwen2": "qwen2",
  "qwen3": "qwen3",
  "qwen3moe": "qwen3_moe",
  "phi3": "phi3",
  "gemma2": "gemma2",
  "gemma3": "gemma3_text",
}
_FIELDS = {
  "context_length": "max_position_embeddings",
  "embedding_length": "hidden_size",
  "block_count": "num_hidden_layers",
  "feed_forward_length": "intermediate_size",
  "attention.head_count": "num_attention_heads",
  "attention.head_count_kv": "num_key_value_heads",
  "attention.layer_norm_rms_epsilon": "rms_norm_eps",
  "attention.sliding_window": "sliding_window",
  "attn_logit_softcapping": "attn_logit_softcapping",
  "final_logit_softcapping": "final_logit_softcapping",
  "rope.freq_base": "rope_theta",
  "rope.freq_base_swa": "rope_local_base_freq",
  "expert_count": "num_experts",
  "expert_used_count": "num_experts_per_tok",
  "expert_feed_forward_length": "moe_intermediate_size",
}
_REQUIRED = (
  "context_length",
  "embedding_length",
  "block_count",
  "feed_forward_length",
  "attention.head_count",
  "attention.layer_norm_rms_epsilon",
)
# Read by the functions below, or without an effect on the logits.
_OTHERS = {
  "vocab_size",
  "attention.key_length",
  "attention.value_length",
  "attention.sliding_window_pattern",
  "rope.dimension_count",
  "rope.scaling.type",
  "rope.scaling.factor",
  "rope.scaling.original_context_length",
  "rope.scaling.finetuned",
}
_TOKENS = {
  "tokenizer.ggml.bos_token_id": "bos_token_id",
  "tokenizer.ggml.eos_token_id": "eos_token_id",
  "tokenizer.ggml.padding_token_id": "pad_token_id",
}
_DEFAULT_THETA = 10_000.0  # Of llama.cpp, for files without rope.freq_base.
# The 27B models scale attention scores by width / num_heads, which the files do
# not say: llama.cpp recognizes them by their number of layers.
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
FREQUENCIES = "rope_freqs.weight"  # Llama 3's scaling of RoPE.


def config_fields(
  metadata: Mapping[str, Any],  # Any: scalars, texts and lists.
  shapes: Mapping[str, tuple[int, ...]],
  frequency_divisors: np.ndarray | None,
) -> dict[str, Any]:  # Any: JSON.
  """Returns the fields of the `config.json` of a GGUF file's model.

  Args:
    metadata: the file's key-value pairs.
    shapes: of its tensors, by GGUF's names, outputs first.
    frequency_divisors: the tensor `rope_freqs.weight`, or None.

  Raises:
    errors.CheckpointError: if the architecture or a key is unknown, or a key is
      missing.
  """
  architecture = metadata.get("general.architecture")
  if architecture not in FAMILIES:
    raise _unsupported(
      f"architecture {architecture!r} is not one of {sorted(FAMILIES)}"
    )
  prefix = f"{architecture}."
  ours = {
    key.removeprefix(prefix): value
    for key, value in metadata.items()
    if key.startswith(prefix)
  }
  if unknown := sorted(ours.keys() - _FIELDS.keys() - _OTHERS):
    raise _unsupported(f"{prefix}{unknown[0]}={ours[unknown[0]]!r} is unknown")
  missing = [key for key in _REQUIRED if key not in ours]
  if missing or "token_embd.weight" not in shapes:
    key = prefix + missing[0] if missing else "token_embd.weight"
    raise _unsupported(f"{key} is missing")
  # Some architectures have one count per layer.
  for key in ("embedding_length", "attention.head_count"):
    if type(ours[key]) is not int or ours[key] < 1:
      raise _unsupported(f"{prefix}{key}={ours[key]!r} is not a count")
  fields = {
    "model_type": FAMILIES[architecture],
    "vocab_size": shapes["token_embd.weight"][0],
    "tie_word_embeddings": "output.weight" not in shapes,
    "rope_theta": _DEFAULT_THETA,
    **{name: _json(ours[key]) for key, name in _FIELDS.items() if key in ours},
    **{name: metadata[key] for key, name in _TOKENS.items() if key in metadata},
  }
  if architecture in ("llama", "qwen3", "qwen3moe"):
    fields["attention_bias"] = "blk.0.attn_q.bias" in shapes
  if architecture == "qwen3moe":
    fields["norm_topk_prob"] = True  # llama.cpp always normalizes.
  if architecture.startswith("gemma"):
    fields["hidden_activation"] = "gelu_pytorch_tanh"
  else:
    fields["hidden_act"] = "silu"
  fields |= _heads(architecture, fields, ours)
  fields |= _rope_scaling(fields, ours, frequency_divisors)
  return fields


def _heads(
  architecture: str,
  fields: Mapping[str, Any],  # Any: JSON.
  ours: Mapping[str, Any],  # Any: as in `config_fields`.
) -> dict[str, Any]:  # Any: JSON.
  """Returns the fields of the shape of attention."""
  width, num_heads = fields["hidden_size"], fields["num_attention_heads"]
  head_width = ours.get("attention.key_length", width // num_heads)
  if ours.get("attention.value_length", head_width) != head_width:
    raise _unsupported("keys and values differ in width")
  heads = {"head_dim": head_width}
  rotated = ours.get("rope.dimension_count", head_width)
  if rotated != head_width:
    heads["partial_rotary_factor"] = rotated / head_width
  if architecture in _GEMMA_27B_LAYERS:
    is_27b = fields["num_hidden_layers"] == _GEMMA_27B_LAYERS[architecture]
    heads["query_pre_attn_scalar"] = (
      width // num_heads if is_27b else head_width
    )
  pattern = ours.get("attention.sliding_window_pattern")
  if isinstance(pattern, list):
    kinds = ("full_attention", "sliding_attention")
    heads["layer_types"] = [kinds[bool(is_local)] for is_local in pattern]
  elif pattern is not None:
    heads["sliding_window_pattern"] = pattern
  return heads


def _rope_scaling(
  fields: Mapping[str, Any],  # Any: JSON.
  ours: Mapping[str, Any],  # Any: as in `config_fields`.
  frequency_divisors: np.ndarray | None,
) -> dict[str, Any]:  # Any: JSON.
  """Returns `rope_scaling`, if the file scales RoPE."""
  kind = ours.get("rope.scaling.type", "none")
  if frequency_divisors is not None:
    if kind not in ("none", "llama3"):
      raise _unsupported(f"{FREQUENCIES} with rope.scaling.type={kind!r}")
    return {"rope_scaling": _llama3(fields, frequency_divisors)}
  if kind == "none":
    return {}
  scaling = {"rope_type": kind, "factor": ours.get("rope.scaling.factor")}
  if kind == "yarn":
    length = ours.get("rope.scaling.original_context_length")
    scaling["original_max_position_embeddings"] = length
  return {"rope_scaling": scaling}


def _llama3(
  fields: Mapping[str, Any],  # Any: JSON.
  divisors: np.ndarray,
) -> dict[str, Any]:  # Any: JSON.
  """Returns Llama 3's scaling, which files store as divisors of frequencies.

  Its parameters are those of Llama 3.1 to 3.3: only the factor, by which the
  lowest frequency is divided, differs between models.
  """
  scaling = rope.Llama3(
    factor=float(divisors.max()),
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
  )
  theta, width = fields["rope_theta"], fields["head_dim"]
  plain = rope.Rope(theta, width, None).frequencies()
  scaled = rope.Rope(theta, width, scaling).frequencies()
  if divisors.shape != plain.shape or not np.allclose(
    plain / divisors, scaled, rtol=1e-4, atol=0
  ):
    raise _unsupported(f"{FREQUENCIES} is not the scaling of Llama 3")
  return {"rope_type": "llama3", **vars(scaling)}


def _json(
  value: Any,  # Any: as in `config_fields`.
) -> Any:  # Any: JSON.
  """Writes a float32 with as few digits as the model's own config has."""
  if isinstance(value, float):
    return float(str(np.float32(value)))
  return value


def _unsupported(why: str) -> errors.CheckpointError:
  return errors.CheckpointError(
    "Unsupported GGUF file.",
    where="its metadata",
    why=f"{why}.",
    fix="Use a file of a supported architecture, or download the model in "
    "Hugging Face format.",
  )
