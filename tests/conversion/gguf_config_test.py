# SPDX-License-Identifier: Apache-2.0
"""Metadata of GGUF files that one family or scaling of RoPE needs."""

import math

import numpy as np
import pytest

from atlas_jax import errors
from conversion import gguf_config

_SHAPES = {"token_embd.weight": (100, 64)}


def _metadata(architecture, **changes):
  ours = {
    "context_length": 128,
    "embedding_length": 64,
    "block_count": 2,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
    **{key.replace("__", "."): value for key, value in changes.items()},
  }
  return {
    "general.architecture": architecture,
    **{f"{architecture}.{key}": value for key, value in ours.items()},
  }


def _fields(architecture, divisors=None, **changes):
  metadata = _metadata(architecture, **changes)
  return gguf_config.config_fields(metadata, _SHAPES, divisors)


def test_numbers_have_the_digits_of_the_original_config():
  assert _fields("llama")["rms_norm_eps"] == 1e-5


def test_a_partially_rotated_head_has_its_fraction():
  fields = _fields("phi3", rope__dimension_count=12)
  assert fields["head_dim"] == 16
  assert fields["partial_rotary_factor"] == 0.75


@pytest.mark.parametrize(
  ("architecture", "num_layers", "scalar"),
  [("gemma2", 46, 16), ("gemma2", 42, 32), ("gemma3", 62, 16)],
)
def test_gemma_27b_scales_scores_by_width_over_heads(
  architecture, num_layers, scalar
):
  fields = _fields(
    architecture, block_count=num_layers, attention__key_length=32
  )
  assert fields["query_pre_attn_scalar"] == scalar


def test_linear_and_yarn_scaling():
  linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
  assert _fields("gemma3", **linear)["rope_scaling"] == {
    "rope_type": "linear",
    "factor": 8.0,
  }
  yarn = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 32,
  }
  assert _fields("qwen2", **yarn)["rope_scaling"] == {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
  }


def _llama3_divisors(theta, width, factor):
  """The loop of llama.cpp's converter, for Llama 3's published parameters."""
  divisors = []
  for pair in range(0, width, 2):
    wavelength = 2 * math.pi * theta ** (pair / width)
    if wavelength < 8192 / 4:
      divisors.append(1.0)
    elif wavelength > 8192 / 1:
      divisors.append(factor)
    else:
      smooth = (8192 / wavelength - 1) / (4 - 1)
      divisors.append(1 / ((1 - smooth) / factor + smooth))
  return np.array(divisors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recognized_by_its_divisors(factor):
  divisors = _llama3_divisors(500_000.0, 16, factor)
  fields = _fields("llama", divisors, rope__freq_base=500_000.0)
  assert fields["rope_scaling"] == {
    "rope_type": "llama3",
    "factor": factor,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
  }
  divisors[3] *= 1.01
  with pytest.raises(errors.CheckpointError, match="not the scaling of Llama"):
    _fields("llama", divisors, rope__freq_base=500_000.0)


def test_counts_that_differ_between_layers_are_rejected():
  with pytest.raises(errors.CheckpointError, match="is not a count"):
    _fields("llama", attention__head_count=[4, 2])


def test_a_missing_key_is_named():
  metadata = _metadata("llama")
  del metadata["llama.block_count"]
  with pytest.raises(
    errors.CheckpointError, match=r"llama\.block_count is mis"
  ):
    gguf_config.config_fields(metadata, _SHAPES, None)
