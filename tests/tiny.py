# SPDX-License-Identifier: Apache-2.0
"""Tiny decoders of odd shapes, and their Hugging Face directories."""

import functools
import json
import math
import pathlib

import jax
import numpy as np

from atlas_jax import sharding
from atlas_jax.models import decoder, decoder_config
from conversion import card, rules, save, verify, weights
from tests import fakes

_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}

LLAMA3_ROPE = {
  "rope_type": "llama3",
  "rope_theta": 500_000.0,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 16,
}
# Fields specific to a family; Gemma's two layers use different attention.
_OWN = {
  "qwen2": {},
  "qwen3": {},
  "llama": {"rope_parameters": LLAMA3_ROPE},
  "mistral": {"sliding_window": 5},
  "phi3": {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.75}},
  "qwen3_moe": {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
  },
  "gemma2": {
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 6,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"],
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
  },
  "gemma3_text": {
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 6,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
      "sliding_attention": _ROPE,
      "full_attention": {
        "rope_type": "linear",
        "rope_theta": 1_000_000.0,
        "factor": 8.0,
      },
    },
  },
}
FAMILIES = tuple(_OWN)

_BLOCKS = {
  "vocab_size": 38,
  "hidden_size": 128,
  "intermediate_size": 128,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 32,
}
_EXPERT_BLOCKS = {"moe_intermediate_size": 128, "num_experts": 4}


def blocks(family):
  """Returns a shape whose kernels divide into nf4 blocks on a 2x2x2 mesh.

  A block has 64 inputs, or 32 where the inputs are those of one head.
  """
  return _BLOCKS | (_EXPERT_BLOCKS if family == "qwen3_moe" else {})


def fields(family, **changes):
  """Returns a config.json: 3 query heads, 1 KV head, H != D / N, odd sizes."""
  return {
    "model_type": family,
    "architectures": [rules.ARCHITECTURES[family]],
    "dtype": "float32",
    "vocab_size": 37,
    "hidden_size": 21,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "rope_parameters": _ROPE,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    **_OWN[family],
    **changes,
  }


def build(
  family,
  *,
  dtype="float32",
  attention="xla",
  remat="none",
  unroll=1,
  layout=None,
  **changes,
):
  """Builds the model of `fields`."""
  config = decoder_config.from_hf(fields(family, **changes))
  return decoder.build(
    config,
    dtype=dtype,
    attention=attention,
    remat=remat,
    unroll=unroll,
    layout=layout,
  )


def mesh(**sizes):
  """Creates a mesh of as many of the eight devices as `sizes` need."""
  sizes = {"data": 1, "fsdp": 1, "tensor": 1, **sizes}
  devices = jax.devices()[: math.prod(sizes.values())]
  return sharding.make_mesh(**sizes, devices=devices)


# One program each; drawn operation by operation, every shape compiles several.
@jax.jit
def _key_data(seed):
  return jax.random.key_data(jax.random.split(jax.random.key(seed), 64))


@functools.partial(jax.jit, static_argnums=1)
def _normal(key_data, size):
  key = jax.random.wrap_key_data(key_data)
  return 0.2 * jax.random.normal(key, (size,))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _token_ids(seed, shape, vocab_size):
  return jax.random.randint(jax.random.key(seed), shape, 0, vocab_size)


def params_of(model, seed=0):
  """Draws parameters with nonzero biases and norm scales other than one.

  An array is the start of a longer draw: one program draws most shapes.
  """
  start = 0.0 if model.config.zero_centered_norms else 1.0
  leaves, structure = jax.tree.flatten_with_path(model.abstract_params)
  keys = np.asarray(_key_data(seed))[: len(leaves)]

  def draw(key, path, leaf):
    size = max(2**14, 2 ** (leaf.size - 1).bit_length())
    drawn = np.asarray(_normal(key, size))[: leaf.size].reshape(leaf.shape)
    # jnp.asarray would compile a program for each shape.
    return jax.device_put(
      drawn + np.float32(start) if path[-1].key == "scale" else drawn
    )

  return jax.tree.unflatten(
    structure,
    [draw(key, *leaf) for key, leaf in zip(keys, leaves, strict=True)],
  )


def batch(model, batch_size=2, num_tokens=9, seed=1):
  """Draws tokens, with their positions and one segment per row."""
  shape = (batch_size, num_tokens)
  tokens = _token_ids(seed, shape, model.config.vocab_size)
  positions = np.broadcast_to(np.arange(num_tokens, dtype=np.int32), shape)
  return jax.device_put((tokens, positions, np.ones(shape, np.int32)))


def record_rows(monkeypatch, recipe):
  """Returns a list of the rows of each batch that `packed_loss` is traced on.

  `recipe` is the module of SFT or GKD.
  """
  found, packed_loss = [], recipe.packed_loss

  def recorded(*args, **kwargs):
    found.append(len(args[-1]["token_ids"]))
    return packed_loss(*args, **kwargs)

  monkeypatch.setattr(recipe, "packed_loss", recorded)
  return found


def write_source(directory: pathlib.Path, family, **changes):
  """Writes the files an export copies: config and tokenizer."""
  directory.mkdir(parents=True)
  text = json.dumps(fields(family, **changes))
  (directory / "config.json").write_text(text)
  (directory / "tokenizer.json").write_text("{}")
  (directory / "tokenizer_config.json").write_text("{}")
  (directory / "chat_template.jinja").write_text("{{ messages }}")
  return directory


def write_checkpoint(
  directory: pathlib.Path,
  family,
  *,
  dtype="float32",
  shard=10**9,
  seed=0,
  **changes,
):
  """Writes a random checkpoint; returns its model and parameters."""
  model = build(family, **changes)
  params = params_of(model, seed)
  source = write_source(
    directory.with_name(directory.name + "-source"), family, **changes
  )
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
  return model, params


def write_talker(directory: pathlib.Path, family="qwen2", **changes):
  """Writes a random checkpoint with a tokenizer; returns model and parameters.

  Sizes are even, so a 2x2x2 mesh divides them.
  """
  source = directory.with_name(directory.name + "-source")
  tokenizer = fakes.write_tokenizer(source)
  changes = {
    "vocab_size": len(tokenizer) + len(tokenizer) % 2,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    **changes,
  }
  (source / "config.json").write_text(json.dumps(fields(family, **changes)))
  model = build(family, **changes)
  params = params_of(model)
  save.save(
    directory,
    params,
    model,
    source=source,
    dtype="float32",
    max_shard_bytes=10**9,
    about=card.Card(base="test"),
    overwrite=False,
  )
  return model, params


def differing(left: pathlib.Path, right: pathlib.Path):
  """Returns names of tensors that are not bitwise equal in two directories."""
  sides = (weights.of_directory(directory) for directory in (left, right))
  return sorted(each.name for each in verify.differences(*sides))
