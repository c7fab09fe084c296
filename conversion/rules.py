# SPDX-License-Identifier: Apache-2.0
"""Which Hugging Face tensor is which parameter; the same table both ways.

Hugging Face stores a projection as [outputs, inputs] with all axes of a side
flattened, and each layer by itself. Ours are [inputs, outputs] with every axis
kept, such as [D, N, H], stacked over the layers.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np

from atlas_jax.models import decoder


@dataclasses.dataclass(frozen=True)
class Rule:
  """One row: a Hugging Face name, a parameter path and the transform.

  `{}` in `name` is the layer's number, and says that the parameter is stacked.
  `num_in` counts the parameter's leading axes that are inputs, the layer axis
  left out: 0 for a bias, None where both sides store the same array.
  """

  name: str
  path: str
  num_in: int | None

  @property
  def stacked(self) -> bool:
    """Tells if the parameter has a leading layer axis."""
    return "{}" in self.name


_LAYER = "model.layers.{}."
_HEADS = _LAYER + "self_attn."
_POST_NORM = _LAYER + "post_attention_layernorm.weight"
_SHARED = (
  Rule("model.embed_tokens.weight", "embed/embedding", None),
  Rule(_LAYER + "input_layernorm.weight", "layers/attention_norm/scale", None),
  Rule(_HEADS + "q_proj.weight", "layers/attention/q/kernel", 1),
  Rule(_HEADS + "k_proj.weight", "layers/attention/k/kernel", 1),
  Rule(_HEADS + "v_proj.weight", "layers/attention/v/kernel", 1),
  Rule(_HEADS + "o_proj.weight", "layers/attention/o/kernel", 2),
  Rule(_POST_NORM, "layers/mlp_norm/scale", None),
  Rule(_LAYER + "mlp.gate_proj.weight", "layers/mlp/gate/kernel", 1),
  Rule(_LAYER + "mlp.up_proj.weight", "layers/mlp/up/kernel", 1),
  Rule(_LAYER + "mlp.down_proj.weight", "layers/mlp/down/kernel", 1),
  Rule("model.norm.weight", "final_norm/scale", None),
  Rule("lm_head.weight", "head/kernel", 1),
)
_QKV_BIAS = (
  Rule(_HEADS + "q_proj.bias", "layers/attention/q/bias", 0),
  Rule(_HEADS + "k_proj.bias", "layers/attention/k/bias", 0),
  Rule(_HEADS + "v_proj.bias", "layers/attention/v/bias", 0),
)
_QK_NORM = (
  Rule(_HEADS + "q_norm.weight", "layers/attention/q_norm/scale", None),
  Rule(_HEADS + "k_norm.weight", "layers/attention/k_norm/scale", None),
)
_FAMILIES = {
  "llama": _SHARED,
  "qwen2": _SHARED + _QKV_BIAS,
  "qwen3": _SHARED + _QK_NORM,
}
ARCHITECTURES = {
  "llama": "LlamaForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
}

# Where a tied head would be, and what it must then equal.
HEAD_NAME, EMBEDDING_NAME = "lm_head.weight", "model.embed_tokens.weight"
# Old Llama files store these; they follow from config.json.
IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def of_model(model: decoder.Model) -> tuple[Rule, ...]:
  """Gives the rules of the model's parameters, in the order of a forward pass.

  Raises:
    ValueError: if the table lacks a parameter, or has one too many.
  """
  paths = {path for path, _ in flatten(model.abstract_params)}
  rules = tuple(
    rule
    for rule in _FAMILIES[model.config.family]
    if not (model.config.tie_embeddings and rule.name == HEAD_NAME)
  )
  if wrong := paths ^ {rule.path for rule in rules}:
    raise ValueError(f"Parameters and rules disagree about {sorted(wrong)}.")
  return rules


def flatten(
  params: decoder.Params,
) -> list[tuple[str, Any]]:  # Any: whatever the leaves are.
  """Lists paths and leaves, in the order of `jax.tree`."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(params)
  return [
    ("/".join(str(key.key) for key in path), leaf) for path, leaf in leaves
  ]


def names(rule: Rule, num_layers: int) -> list[str]:
  """Lists the Hugging Face tensors a parameter is made of, layer by layer."""
  if not rule.stacked:
    return [rule.name]
  return [rule.name.format(layer) for layer in range(num_layers)]


def hf_shape(rule: Rule, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Computes the file's shape from ours, the layer axis left out."""
  if rule.num_in is None:
    return shape
  outputs = math.prod(shape[rule.num_in :])
  if rule.num_in == 0:
    return (outputs,)
  return (outputs, math.prod(shape[: rule.num_in]))


def shapes(model: decoder.Model) -> dict[str, tuple[int, ...]]:
  """Computes every tensor of the model's files, in order, with its shape."""
  leaves = dict(flatten(model.abstract_params))
  result: dict[str, tuple[int, ...]] = {}
  for rule in of_model(model):
    shape = leaves[rule.path].shape[1 if rule.stacked else 0 :]
    for name in names(rule, model.config.num_layers):
      result[name] = hf_shape(rule, shape)
  return result


def from_hf(
  rule: Rule, array: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
  """Views a file's tensor as one layer of ours, without a copy."""
  return (array.T if rule.num_in else array).reshape(shape)


def to_hf(rule: Rule, array: np.ndarray) -> np.ndarray:
  """Views one layer of ours as a file's tensor; often not contiguous."""
  shape = hf_shape(rule, array.shape)
  if rule.num_in:
    return array.reshape(shape[::-1]).T
  return array.reshape(shape)
