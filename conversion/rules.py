# SPDX-License-Identifier: Apache-2.0
"""Maps Hugging Face tensors to parameters; one table serves both directions.

Hugging Face stores each layer and expert separately, and a projection as
[outputs, inputs] with the axes of each side flattened. Parameters are
[inputs, outputs] with all axes kept, such as [D, N, H], and stacked over layers
and experts. Phi concatenates several projections into one tensor, by rows:

  self_attn.q_proj.weight [N H, D]  <->  layers/attention/q/kernel [L, D, N, H]
"""

from collections.abc import Iterator
import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np

from atlas_jax.models import decoder


@dataclasses.dataclass(frozen=True)
class Rule:
  """One row of the table: Hugging Face name, parameter path and transform.

  `{layer}` and `{expert}` in `name` are indices of the parameter's leading
  (stacked) axes. `num_in` is the number of input axes after those: 0 for a
  bias, None if both sides store the same array. Rules with the same name share
  its tensor, in the order of the table.
  """

  name: str
  path: str
  num_in: int | None

  @property
  def num_stacked(self) -> int:
    """Number of leading axes that the tensors in the file do not have."""
    return self.name.count("{")


@dataclasses.dataclass(frozen=True)
class Piece:
  """Rows `start` to `stop` of a tensor in a file: one layer of a parameter.

  `index` is its index in the stacked axes, `shape` that of the parameter
  without them.
  """

  name: str
  rule: Rule
  index: tuple[int, ...]
  shape: tuple[int, ...]
  start: int
  stop: int


_LAYER = "model.layers.{layer}."
_HEADS = _LAYER + "self_attn."
_MLP = _LAYER + "mlp."
_EXPERT = _MLP + "experts.{expert}."
_ENDS = (
  Rule("model.embed_tokens.weight", "embed/embedding", None),
  Rule("model.norm.weight", "final_norm/scale", None),
  Rule("lm_head.weight", "head/kernel", 1),
)
_NORMS = (
  Rule(_LAYER + "input_layernorm.weight", "layers/attention_norm/scale", None),
  Rule(
    _LAYER + "post_attention_layernorm.weight", "layers/mlp_norm/scale", None
  ),
)
_FOUR_NORMS = (
  _NORMS[0],
  Rule(
    _LAYER + "post_attention_layernorm.weight",
    "layers/attention_post_norm/scale",
    None,
  ),
  Rule(
    _LAYER + "pre_feedforward_layernorm.weight", "layers/mlp_norm/scale", None
  ),
  Rule(
    _LAYER + "post_feedforward_layernorm.weight",
    "layers/mlp_post_norm/scale",
    None,
  ),
)
_ATTENTION = (
  Rule(_HEADS + "q_proj.weight", "layers/attention/q/kernel", 1),
  Rule(_HEADS + "k_proj.weight", "layers/attention/k/kernel", 1),
  Rule(_HEADS + "v_proj.weight", "layers/attention/v/kernel", 1),
  Rule(_HEADS + "o_proj.weight", "layers/attention/o/kernel", 2),
  Rule(_HEADS + "q_proj.bias", "layers/attention/q/bias", 0),
  Rule(_HEADS + "k_proj.bias", "layers/attention/k/bias", 0),
  Rule(_HEADS + "v_proj.bias", "layers/attention/v/bias", 0),
  Rule(_HEADS + "o_proj.bias", "layers/attention/o/bias", 0),
)
_QK_NORM = (
  Rule(_HEADS + "q_norm.weight", "layers/attention/q_norm/scale", None),
  Rule(_HEADS + "k_norm.weight", "layers/attention/k_norm/scale", None),
)
_GATED = (
  Rule(_MLP + "gate_proj.weight", "layers/mlp/gate/kernel", 1),
  Rule(_MLP + "up_proj.weight", "layers/mlp/up/kernel", 1),
  Rule(_MLP + "down_proj.weight", "layers/mlp/down/kernel", 1),
)
_MIXTURE = (
  Rule(_MLP + "gate.weight", "layers/mixture/router/kernel", 1),
  Rule(_EXPERT + "gate_proj.weight", "layers/mixture/gate", 1),
  Rule(_EXPERT + "up_proj.weight", "layers/mixture/up", 1),
  Rule(_EXPERT + "down_proj.weight", "layers/mixture/down", 1),
)
_FUSED = (
  Rule(_HEADS + "qkv_proj.weight", "layers/attention/q/kernel", 1),
  Rule(_HEADS + "qkv_proj.weight", "layers/attention/k/kernel", 1),
  Rule(_HEADS + "qkv_proj.weight", "layers/attention/v/kernel", 1),
  Rule(_HEADS + "o_proj.weight", "layers/attention/o/kernel", 2),
  Rule(_MLP + "gate_up_proj.weight", "layers/mlp/gate/kernel", 1),
  Rule(_MLP + "gate_up_proj.weight", "layers/mlp/up/kernel", 1),
  Rule(_MLP + "down_proj.weight", "layers/mlp/down/kernel", 1),
)
_LLAMA = _ENDS + _NORMS + _ATTENTION + _GATED
_FAMILIES = {
  "llama": _LLAMA,
  "mistral": _LLAMA,
  "phi3": _ENDS + _NORMS + _FUSED,
  "qwen2": _LLAMA,
  "qwen3": _LLAMA + _QK_NORM,
  "qwen3_moe": _ENDS + _NORMS + _ATTENTION + _QK_NORM + _MIXTURE,
  "gemma2": _ENDS + _FOUR_NORMS + _ATTENTION + _GATED,
  "gemma3_text": _ENDS + _FOUR_NORMS + _ATTENTION + _QK_NORM + _GATED,
}
# Parameters that only some checkpoints of a family have.
_OPTIONAL = re.compile(r"head/kernel|layers/attention/./bias")
ARCHITECTURES = {
  "llama": "LlamaForCausalLM",
  "mistral": "MistralForCausalLM",
  "phi3": "Phi3ForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
  "qwen3_moe": "Qwen3MoeForCausalLM",
  "gemma2": "Gemma2ForCausalLM",
  "gemma3_text": "Gemma3ForCausalLM",
}

# A tied head may be in the files, and must equal the embedding.
HEAD_NAME, EMBEDDING_NAME = "lm_head.weight", "model.embed_tokens.weight"
# Old Llama files store these; they are computed from config.json.
IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def flatten(
  params: decoder.Params,
) -> list[tuple[str, Any]]:  # Any: whatever the leaves are.
  """Returns (path, leaf) pairs in the order of `jax.tree`."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(params)
  return [
    ("/".join(str(key.key) for key in path), leaf) for path, leaf in leaves
  ]


def of_model(model: decoder.Model) -> tuple[Rule, ...]:
  """Returns the rules for the model's parameters.

  Raises:
    ValueError: if the table lacks a parameter, or has an extra one.
  """
  paths = {path for path, _ in flatten(model.abstract_params)}
  rules = tuple(
    rule
    for rule in _FAMILIES[model.config.family]
    if rule.path in paths or not _OPTIONAL.fullmatch(rule.path)
  )
  if wrong := paths ^ {rule.path for rule in rules}:
    raise ValueError(f"Parameters and rules differ in {sorted(wrong)}.")
  return rules


def pieces(model: decoder.Model) -> Iterator[Piece]:
  """Yields the pieces of the model's files, tensor by tensor."""
  leaves = dict(flatten(model.abstract_params))
  ends: dict[str, int] = {}
  for rule in of_model(model):
    shape = leaves[rule.path].shape
    stacked, shape = shape[: rule.num_stacked], shape[rule.num_stacked :]
    for index in np.ndindex(stacked):
      name = rule.name.format(**dict(zip(_AXES, index, strict=False)))
      start = ends.get(name, 0)
      ends[name] = start + hf_shape(rule, shape)[0]
      yield Piece(name, rule, index, shape, start, ends[name])


_AXES = ("layer", "expert")


def shapes(model: decoder.Model) -> dict[str, tuple[int, ...]]:
  """Returns the shape of every tensor of the model's files, in order."""
  result: dict[str, tuple[int, ...]] = {}
  for piece in pieces(model):
    _, *rest = hf_shape(piece.rule, piece.shape)
    result[piece.name] = (piece.stop, *rest)
  return result


def hf_shape(rule: Rule, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Returns the shape in the file of a parameter's unstacked `shape`."""
  if rule.num_in is None:
    return shape
  outputs = math.prod(shape[rule.num_in :])
  if rule.num_in == 0:
    return (outputs,)
  return (outputs, math.prod(shape[: rule.num_in]))


def from_hf(
  rule: Rule, array: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
  """Views rows of a file's tensor as one layer of a parameter; no copy."""
  return (array.T if rule.num_in else array).reshape(shape)


def to_hf(rule: Rule, array: np.ndarray) -> np.ndarray:
  """Views one layer of a parameter as rows of a file; often not contiguous."""
  shape = hf_shape(rule, array.shape)
  if rule.num_in:
    return array.reshape(shape[::-1]).T
  return array.reshape(shape)
