# SPDX-License-Identifier: Apache-2.0
"""Decoder configuration, read from a Hugging Face `config.json`.

A field that transformers reads is read here too, has no effect on the logits,
or must hold the one value that this decoder computes; otherwise it is rejected
by name, since ignoring it would compute a different model. A field that
transformers does not read (see `hf_fields`) is ignored.
"""

from collections.abc import Collection, Iterator, Mapping
import dataclasses
import math
from typing import Any, Literal

from atlas_jax import errors
from atlas_jax.models import hf_fields
from atlas_jax.models import rope as rope_lib

Activation = Literal["silu", "gelu_tanh"]


@dataclasses.dataclass(frozen=True)
class Experts:
  """Mixture of experts: each token is routed to `num_chosen` of `count`.

  `normalise` rescales the weights of the chosen experts to sum to one.
  """

  count: int
  num_chosen: int
  width: int
  normalise: bool


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """A decoder-only transformer: RoPE, grouped queries, a gated MLP, pre-norms.

  `head_width` is independent of `width / num_heads`. `qk_norm` normalises
  queries and keys per head, before RoPE. `post_norms` also normalises the
  outputs of attention and MLP; `zero_centered_norms` stores norm scales minus
  one. Attention scores are multiplied by `attention_scale`; a soft cap c maps x
  to c tanh(x / c). Layers marked in `local` attend to the last `window` tokens,
  their own included, and use `local_rope`. `ignored_fields` are those that the
  user chose to ignore.
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
  rope: rope_lib.Rope
  local_rope: rope_lib.Rope
  local: tuple[bool, ...]
  window: int | None
  activation: Activation
  norm_epsilon: float
  zero_centered_norms: bool
  post_norms: bool
  initializer_range: float
  embedding_scale: float
  attention_scale: float
  attention_soft_cap: float | None
  logit_soft_cap: float | None
  qkv_bias: bool
  out_bias: bool
  qk_norm: bool
  tie_embeddings: bool
  experts: Experts | None
  ignored_fields: tuple[str, ...] = dataclasses.field(default=(), compare=False)

  def __post_init__(self) -> None:
    """Validates head counts, the window size and the number of experts."""
    if self.num_heads % self.num_kv_heads:
      raise _unsupported(
        f"num_attention_heads={self.num_heads} is not a multiple of "
        f"num_key_value_heads={self.num_kv_heads}"
      )
    if any(self.local) and self.window is None:
      raise _unsupported("sliding_window is missing, but layers use it")
    if self.experts and self.experts.num_chosen > self.experts.count:
      raise _unsupported("num_experts_per_tok exceeds num_experts")


@dataclasses.dataclass(frozen=True)
class _Family:
  """Architecture implied by `model_type`, and its family-specific fields."""

  reads: frozenset[str] = frozenset()
  qkv_bias: bool = False
  qk_norm: bool = False
  gemma: bool = False  # Scaled embeddings, post-norms, zero-centered norms.
  global_every: int | None = None  # Every such layer has full attention.
  two_ropes: bool = False
  head_width: int | None = None  # Used if `head_dim` is absent.


_BIASED = frozenset({"attention_bias"})
_WINDOWED = frozenset({"sliding_window", "layer_types"})
_SWITCHED = _WINDOWED | {"use_sliding_window", "max_window_layers"}
_SPARSE = frozenset(
  {
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
  }
)
_GEMMA = _WINDOWED | {
  "query_pre_attn_scalar",
  "attn_logit_softcapping",
  "final_logit_softcapping",
  "hidden_activation",
  "hidden_act",  # In older files too; transformers reads hidden_activation.
}
_GLOBAL, _LOCAL = "full_attention", "sliding_attention"
_FAMILIES = {
  "llama": _Family(_BIASED),
  "mistral": _Family(frozenset({"sliding_window"})),
  "phi3": _Family(frozenset({"sliding_window"})),
  "qwen2": _Family(_SWITCHED, qkv_bias=True),
  "qwen3": _Family(_BIASED | _SWITCHED, qk_norm=True, head_width=128),
  "qwen3_moe": _Family(_BIASED | _SPARSE, qk_norm=True),
  "gemma2": _Family(_GEMMA, gemma=True, global_every=2, head_width=256),
  "gemma3_text": _Family(
    _GEMMA | {"rope_local_base_freq", "sliding_window_pattern"},
    qk_norm=True,
    gemma=True,
    global_every=6,
    two_ropes=True,
    head_width=256,
  ),
}

_COUNTS = {
  "vocab_size",
  "hidden_size",
  "intermediate_size",
  "num_hidden_layers",
  "num_attention_heads",
  "num_key_value_heads",
  "head_dim",
  "max_position_embeddings",
  "sliding_window",
  "sliding_window_pattern",
  "num_experts",
  "num_local_experts",
  "num_experts_per_tok",
  "moe_intermediate_size",
}
_NUMBERS = {
  "rms_norm_eps",
  "initializer_range",
  "rope_theta",
  "query_pre_attn_scalar",
  "attn_logit_softcapping",
  "final_logit_softcapping",
  "rope_local_base_freq",
  "partial_rotary_factor",
}
_FLAGS = {
  "tie_word_embeddings",
  "attention_bias",
  "use_sliding_window",
  "norm_topk_prob",
}
_OBJECTS = {"rope_scaling", "rope_parameters"}
# Fields that every family reads.
_READ = {
  "model_type",
  "vocab_size",
  "hidden_size",
  "intermediate_size",
  "num_hidden_layers",
  "num_attention_heads",
  "num_key_value_heads",
  "head_dim",
  "max_position_embeddings",
  "rms_norm_eps",
  "rope_theta",
  "initializer_range",
  "tie_word_embeddings",
  "partial_rotary_factor",
  *_OBJECTS,
}
# Fields that do not affect the logits in evaluation mode; those that only
# transformers itself writes are not in `hf_fields`.
_NO_EFFECT = {
  "architectures",
  "transformers_version",
  "torch_dtype",
  "dtype",
  "name_or_path",
  "_name_or_path",
  "_commit_hash",
  "use_cache",
  "return_dict",
  "id2label",
  "label2id",
  "output_attentions",
  "output_hidden_states",
  "is_encoder_decoder",
  "chunk_size_feed_forward",
  "problem_type",
  "num_labels",
  "max_window_layers",
  "bos_token_id",
  "eos_token_id",
  "pad_token_id",
  "attention_dropout",
  "sliding_window",
  "attention_chunk_size",  # Only chunked_attention layers use it.
  "attn_implementation",
  "_attn_implementation",
  "_attn_implementation_autoset",
  "experts_implementation",
  "resid_pdrop",
  "embd_pdrop",
  "cache_implementation",
  "output_router_logits",
  "router_aux_loss_coef",
  "original_max_position_embeddings",
  "_sliding_window_pattern",
}
_ACTIVATIONS: dict[str, Activation] = {
  "silu": "silu",
  "gelu_pytorch_tanh": "gelu_tanh",
}
# The only supported values, unless the family reads the field.
_REQUIRED: dict[str, tuple[Any, ...]] = {  # Any: JSON scalars.
  "hidden_act": ("silu",),
  "attention_bias": (False, None),
  "mlp_bias": (False, None),
  "use_sliding_window": (False, None),
  "use_bidirectional_attention": (False, None),
  "is_causal": (True, None),
  "per_layer_config": (None,),
  "pretraining_tp": (1, None),
  "quantization_config": (None,),
}


def from_hf(
  fields: Mapping[str, Any], *, ignore_fields: Collection[str] = ()
) -> DecoderConfig:
  """Reads the fields of a `config.json`.

  Args:
    fields: the parsed file, as written by transformers 4 or 5.
    ignore_fields: names of fields that are treated as absent.

  Returns:
    The decoder's shape.

  Raises:
    errors.CheckpointError: if the architecture is unknown, a field is missing,
      or fields ask for something this decoder does not compute.
  """
  ignored = tuple(key for key in fields if key in ignore_fields)
  fields = {key: fields[key] for key in fields if key not in ignored}
  name = fields.get("model_type")
  if not isinstance(name, str) or name not in _FAMILIES:
    raise _unsupported(
      f"model_type={name!r} is not one of {sorted(_FAMILIES)}",
      fix="Use a checkpoint of a supported family.",
    )
  family = _FAMILIES[name]
  if problems := list(_problems(fields, family)):
    raise _unsupported("; ".join(problems))
  # A null field counts as absent, as in transformers.
  read = {
    key: value
    for key, value in fields.items()
    if value is not None and key in _READ | family.reads
  }
  _check_types(read)
  try:
    config = _read(name, family, read)
  except KeyError as missing:
    raise _unsupported(
      f"field {missing} is missing", fix="Use a complete config.json."
    ) from missing
  except ValueError as wrong:
    raise _unsupported(str(wrong)) from wrong
  return dataclasses.replace(config, ignored_fields=ignored)


def unread(fields: Mapping[str, Any]) -> list[str]:
  """Returns the fields of a `config.json` that transformers does not read."""
  known = hf_fields.READ | _READ | _NO_EFFECT | _REQUIRED.keys()
  return sorted(fields.keys() - known)


def _read(
  name: str, family: _Family, fields: Mapping[str, Any]
) -> DecoderConfig:
  """Reads fields of validated types."""
  width, num_heads = fields["hidden_size"], fields["num_attention_heads"]
  head_width = fields.get("head_dim") or family.head_width or width // num_heads
  bias = fields.get("attention_bias", False)
  local = _local(family, fields)
  rope, local_rope = _ropes(family, fields, head_width)
  scores = fields.get("query_pre_attn_scalar", 256 if family.gemma else None)
  return DecoderConfig(
    family=name,
    vocab_size=fields["vocab_size"],
    width=width,
    mlp_width=fields["intermediate_size"],
    num_layers=fields["num_hidden_layers"],
    num_heads=num_heads,
    num_kv_heads=fields.get("num_key_value_heads", num_heads),
    head_width=head_width,
    max_positions=fields["max_position_embeddings"],
    rope=rope,
    local_rope=local_rope,
    local=local,
    window=fields["sliding_window"] if any(local) else None,
    activation=_activation(family, fields),
    norm_epsilon=fields["rms_norm_eps"],
    zero_centered_norms=family.gemma,
    post_norms=family.gemma,
    initializer_range=fields.get("initializer_range", 0.02),
    embedding_scale=math.sqrt(width) if family.gemma else 1.0,
    attention_scale=(scores or head_width) ** -0.5,
    attention_soft_cap=fields.get("attn_logit_softcapping"),
    logit_soft_cap=fields.get("final_logit_softcapping"),
    qkv_bias=family.qkv_bias or bias,
    out_bias=bias,
    qk_norm=family.qk_norm,
    tie_embeddings=fields.get("tie_word_embeddings", family.gemma),
    experts=_experts(fields) if "num_experts" in family.reads else None,
  )


def _problems(fields: Mapping[str, Any], family: _Family) -> Iterator[str]:
  """Yields the fields that would change the logits, but are not computed."""
  for key, value in fields.items():
    if key in family.reads:
      continue
    if key in _REQUIRED:
      if value not in _REQUIRED[key]:
        yield f"{key} must be {_REQUIRED[key][0]!r}, got {value!r}"
    elif key == "layer_types":
      kinds = value if isinstance(value, list) else [value]
      if value is not None and any(kind != "full_attention" for kind in kinds):
        yield f"layer_types must all be full_attention, got {value!r}"
    # An empty value, such as a null soft cap or 0 experts, disables a feature.
    elif value and key in hf_fields.READ - _READ - _NO_EFFECT:
      yield f"{key}={value!r} is not computed for this model_type"


def _check_types(fields: Mapping[str, Any]) -> None:  # Any: JSON.
  """Validates fields that hold counts, numbers, flags or objects."""
  for key, value in fields.items():
    # `type`, since a JSON true is an `int` to isinstance.
    kind = type(value)
    if key in _COUNTS and (kind is not int or value < 1):
      raise _unsupported(f"{key} must be a positive integer, got {value!r}")
    if key in _NUMBERS and not (kind in (int, float) and 0 < value < math.inf):
      raise _unsupported(f"{key} must be a positive number, got {value!r}")
    if key in _OBJECTS and kind is not dict:
      raise _unsupported(f"{key} must be an object, got {value!r}")
    if key in _FLAGS and kind is not bool:
      raise _unsupported(f"{key} must be true or false, got {value!r}")


def _ropes(
  family: _Family, fields: Mapping[str, Any], head_width: int
) -> tuple[rope_lib.Rope, rope_lib.Rope]:
  """Returns the RoPE of global layers and that of local layers.

  transformers 5 writes one field, `rope_parameters` (for Gemma 3, one object
  per kind of layer); transformers 4 writes several fields.
  """
  base = {
    "rope_theta": fields.get(
      "rope_theta", 1_000_000.0 if family.two_ropes else 10_000.0
    ),
    "partial_rotary_factor": fields.get("partial_rotary_factor", 1.0),
  }
  scaling = fields.get("rope_scaling", {})
  newer = fields.get("rope_parameters", {})
  if not family.two_ropes:
    # If both are present, transformers reads rope_scaling only.
    rope = rope_lib.from_hf(base | (scaling or newer), head_width=head_width)
    return rope, rope
  if newer.keys() - {_GLOBAL, _LOCAL}:
    raise ValueError(
      f"rope_parameters must have keys {_GLOBAL} and {_LOCAL}, got {newer!r}"
    )
  local = {"rope_theta": fields.get("rope_local_base_freq", 10_000.0)}
  return (
    rope_lib.from_hf(
      base | newer.get(_GLOBAL, {}) | scaling, head_width=head_width
    ),
    rope_lib.from_hf(
      base | local | newer.get(_LOCAL, {}), head_width=head_width
    ),
  )


def _local(family: _Family, fields: Mapping[str, Any]) -> tuple[bool, ...]:
  """Returns for each layer whether it attends to a window only."""
  num_layers = fields["num_hidden_layers"]
  everywhere_global = (False,) * num_layers
  if "sliding_window" not in family.reads:
    return everywhere_global
  switched_off = "use_sliding_window" in family.reads and not fields.get(
    "use_sliding_window", False
  )
  if "layer_types" in family.reads and "layer_types" in fields:
    kinds = fields["layer_types"]
    known = isinstance(kinds, list) and all(
      kind in (_GLOBAL, _LOCAL) for kind in kinds
    )
    if not known or len(kinds) != num_layers:
      raise ValueError(
        f"layer_types must name {_GLOBAL} or {_LOCAL} for each of "
        f"{num_layers} layers, got {kinds!r}"
      )
    if switched_off and _LOCAL in kinds:
      raise ValueError(
        f"layer_types has {_LOCAL}, but use_sliding_window is false"
      )
    return tuple(kind == _LOCAL for kind in kinds)
  if switched_off:
    return everywhere_global
  if family.global_every is not None:
    every = fields.get("sliding_window_pattern", family.global_every)
    return tuple((layer + 1) % every != 0 for layer in range(num_layers))
  if "max_window_layers" in family.reads:
    first = fields.get("max_window_layers", 28)
    return tuple(layer >= first for layer in range(num_layers))
  return ("sliding_window" in fields,) * num_layers


def _activation(family: _Family, fields: Mapping[str, Any]) -> Activation:
  if not family.gemma:
    return "silu"
  name = fields.get("hidden_activation", "gelu_pytorch_tanh")
  if name not in _ACTIVATIONS:
    raise ValueError(
      f"hidden_activation must be one of {sorted(_ACTIVATIONS)}, got {name!r}"
    )
  return _ACTIVATIONS[name]


def _experts(fields: Mapping[str, Any]) -> Experts:
  if fields.get("decoder_sparse_step", 1) != 1 or fields.get("mlp_only_layers"):
    raise ValueError("layers with and without experts cannot be combined")
  # transformers 5 renamed the field to num_local_experts.
  count = fields.get("num_local_experts") or fields["num_experts"]
  return Experts(
    count=count,
    num_chosen=fields["num_experts_per_tok"],
    width=fields["moe_intermediate_size"],
    normalise=fields.get("norm_topk_prob", False),
  )


def _unsupported(
  what: str,
  fix: str = "Use a checkpoint without it. To treat a field as absent, name it "
  "in --config.model.ignore_fields, or in --ignore_fields of scripts.convert "
  "and scripts.serve.",
) -> errors.CheckpointError:
  return errors.CheckpointError(
    f"Unsupported model: {what}.",
    where="config.json",
    why="A missing or ignored field would silently compute another model.",
    fix=fix,
  )
