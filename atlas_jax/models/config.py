# SPDX-License-Identifier: Apache-2.0
"""The shape of a decoder, read from a Hugging Face `config.json`.

Every field of the file is either read, known to have no effect on the logits,
or required to hold the one value this decoder computes. Anything else is
refused by name: a field ignored in silence is a wrong model.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

from atlas_jax import errors


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3's frequency scaling; see `attention.rope_frequencies`."""

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_positions: int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """A decoder-only transformer: pre-norm, RoPE, GQA, gated SiLU MLP.

  `head_width` is independent of `width / num_heads`. `qk_norm` normalises
  queries and keys per head, before RoPE.
  """

  family: str
  vocab_size: int
  width: int
  mlp_width: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_width: int
  max_positions: int
  rope_theta: float
  rope_scaling: RopeScaling | None
  norm_epsilon: float
  initializer_range: float
  qkv_bias: bool
  qk_norm: bool
  tie_embeddings: bool

  def __post_init__(self) -> None:
    """Refuses head counts that cannot be grouped, and odd head widths."""
    if self.num_heads % self.num_kv_heads:
      raise _refuse(
        f"num_attention_heads={self.num_heads} is no multiple of "
        f"num_key_value_heads={self.num_kv_heads}"
      )
    if self.head_width % 2:
      raise _refuse(f"head_dim={self.head_width} is odd; RoPE turns pairs")


@dataclasses.dataclass(frozen=True)
class _Family:
  """What `model_type` alone decides."""

  qkv_bias: bool | None  # None: the field `attention_bias` decides.
  qk_norm: bool
  head_width: int | None  # When `head_dim` is absent; None: width / heads.


_FAMILIES = {
  "qwen2": _Family(qkv_bias=True, qk_norm=False, head_width=None),
  "qwen3": _Family(qkv_bias=False, qk_norm=True, head_width=128),
  "llama": _Family(qkv_bias=False, qk_norm=False, head_width=None),
}

_COUNTS = {
  *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
  *("num_attention_heads", "num_key_value_heads", "head_dim"),
  *("max_position_embeddings",),
}
_NUMBERS = {"rms_norm_eps", "initializer_range", "rope_theta"}
_OBJECTS = {"rope_scaling", "rope_parameters"}
_READ = _COUNTS | _NUMBERS | _OBJECTS | {"model_type", "tie_word_embeddings"}
# No effect on the logits of a decoder in evaluation.
_NO_EFFECT = {
  *("architectures", "transformers_version", "torch_dtype", "dtype"),
  *("_name_or_path", "use_cache", "return_dict", "id2label", "label2id"),
  *("output_attentions", "output_hidden_states", "is_encoder_decoder"),
  *("chunk_size_feed_forward", "problem_type", "max_window_layers"),
  *("bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout"),
  *("sliding_window", "_attn_implementation_autoset"),
}
# Honoured only at these values.
_REQUIRED: dict[str, tuple[Any, ...]] = {  # Any: JSON scalars.
  "hidden_act": ("silu",),
  "attention_bias": (False, None),
  "mlp_bias": (False, None),
  "use_sliding_window": (False, None),
  "pretraining_tp": (1, None),
  "quantization_config": (None,),
  "partial_rotary_factor": (1.0, None),
}


def from_hf(fields: Mapping[str, Any]) -> DecoderConfig:
  """Reads the fields of a `config.json`.

  Args:
    fields: the parsed file, as written by transformers 4 or 5.

  Returns:
    The decoder's shape.

  Raises:
    errors.CheckpointError: if the architecture is unknown, a field is missing,
      or a field asks for something this decoder does not compute.
  """
  name = fields.get("model_type")
  if not isinstance(name, str) or name not in _FAMILIES:
    raise _refuse(
      f"model_type={name!r} is not one of {sorted(_FAMILIES)}",
      fix="Use a checkpoint of a family in the list.",
    )
  family = _FAMILIES[name]
  _refuse_unknown(fields)
  # A null means what an absent field means, here as in transformers.
  fields = {key: value for key, value in fields.items() if value is not None}
  _check_types(fields)
  try:
    width = fields["hidden_size"]
    num_heads = fields["num_attention_heads"]
    return DecoderConfig(
      family=name,
      vocab_size=fields["vocab_size"],
      width=width,
      mlp_width=fields["intermediate_size"],
      num_layers=fields["num_hidden_layers"],
      num_heads=num_heads,
      num_kv_heads=fields.get("num_key_value_heads", num_heads),
      head_width=fields.get("head_dim")
      or family.head_width
      or width // num_heads,
      max_positions=fields["max_position_embeddings"],
      norm_epsilon=fields["rms_norm_eps"],
      initializer_range=fields.get("initializer_range", 0.02),
      qkv_bias=bool(family.qkv_bias),
      qk_norm=family.qk_norm,
      tie_embeddings=fields.get("tie_word_embeddings", False),
      **_rope(fields),
    )
  except KeyError as missing:
    raise _refuse(f"field {missing} is missing") from missing


def _refuse_unknown(fields: Mapping[str, Any]) -> None:
  """Refuses fields that are unknown, or known at another value."""
  for key, value in fields.items():
    if key in _REQUIRED:
      if value not in _REQUIRED[key]:
        raise _refuse(
          f"{key}={value!r}; only {_REQUIRED[key][0]!r} is computed"
        )
    elif key == "layer_types":
      kinds = value if isinstance(value, list) else [value]
      if value is not None and any(kind != "full_attention" for kind in kinds):
        raise _refuse(f"layer_types={value!r}; only full_attention is computed")
    elif key not in _READ | _NO_EFFECT:
      raise _refuse(f"field {key}={value!r} is not known")


def _check_types(fields: Mapping[str, Any]) -> None:  # Any: JSON.
  """Refuses values that are no counts, numbers or flags where they must be."""
  for key, value in fields.items():
    # A JSON true is no number, though Python counts with it.
    kind = type(value)
    if key in _COUNTS and (kind is not int or value < 1):
      raise _refuse(f"{key}={value!r} is no positive integer")
    if key in _NUMBERS and not _is_positive(value):
      raise _refuse(f"{key}={value!r} is no positive number")
    if key in _OBJECTS and kind is not dict:
      raise _refuse(f"{key}={value!r} is no object")
    if key == "tie_word_embeddings" and kind is not bool:
      raise _refuse(f"{key}={value!r} is neither true nor false")


def _is_positive(value: Any) -> bool:  # Any: JSON.
  return type(value) in (int, float) and 0 < value < math.inf


def _rope(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Reads RoPE from transformers 5's one field or transformers 4's two."""
  rope = dict(fields.get("rope_scaling", {}))
  rope |= fields.get("rope_parameters", {})
  theta = rope.pop("rope_theta", fields.get("rope_theta", 10_000.0))
  legacy_type = rope.pop("type", "default")
  kind = rope.pop("rope_type", legacy_type)
  if rope.pop("partial_rotary_factor", 1.0) != 1.0:
    raise _refuse("rope_parameters.partial_rotary_factor is not 1.0")
  for key, value in {"rope_theta": theta, **rope}.items():
    if not _is_positive(value):
      raise _refuse(f"rope field {key}={value!r} is no positive number")
  if kind == "default" and not rope:
    return {"rope_theta": float(theta), "rope_scaling": None}
  if kind != "llama3":
    raise _refuse(f"rope_type={kind!r} with {sorted(rope)}")
  try:
    scaling = RopeScaling(
      factor=rope.pop("factor"),
      low_freq_factor=rope.pop("low_freq_factor"),
      high_freq_factor=rope.pop("high_freq_factor"),
      original_max_positions=rope.pop("original_max_position_embeddings"),
    )
  except KeyError as missing:
    raise _refuse(f"rope field {missing} is missing") from missing
  if rope:
    raise _refuse(f"rope fields {sorted(rope)} are not known")
  if scaling.high_freq_factor <= scaling.low_freq_factor:
    raise _refuse("high_freq_factor is not above low_freq_factor")
  return {"rope_theta": float(theta), "rope_scaling": scaling}


def _refuse(
  why: str, fix: str = "Use a checkpoint without it."
) -> errors.CheckpointError:
  return errors.CheckpointError(
    "This model cannot be computed faithfully.",
    where="config.json",
    why=f"{why}.",
    fix=fix,
  )
