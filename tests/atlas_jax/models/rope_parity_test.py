# SPDX-License-Identifier: Apache-2.0
"""Rotary frequencies against transformers."""

import numpy as np
import pytest

from atlas_jax.models import decoder_config, rope
from tests import tiny

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

_YARN = {
  "rope_type": "yarn",
  "rope_theta": 1_000_000.0,
  "factor": 4.0,
  "original_max_position_embeddings": 32768,
}


def _llama3(original, factor):
  return {
    **tiny.LLAMA3_ROPE,
    "factor": factor,
    "original_max_position_embeddings": original,
  }


@pytest.mark.parametrize(
  ("head_dim", "parameters"),
  [
    (8, _llama3(16, 8.0)),
    (64, _llama3(512, 32.0)),  # Llama 3.2.
    (128, _llama3(8192, 8.0)),  # Llama 3.1.
    (128, _YARN),  # Qwen 2.5 and 3 past 32k.
    (64, {**_YARN, "beta_fast": 16.0, "beta_slow": 2.0}),
    (16, {**_YARN, "attention_factor": 1.3, "factor": 40.0}),
    (8, {**_YARN, "original_max_position_embeddings": 64}),
    (32, {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}),
  ],
)
def test_frequencies_match_transformers(head_dim, parameters):
  from transformers import modeling_rope_utils

  fields = tiny.fields(
    "qwen2",
    head_dim=head_dim,
    rope_parameters=parameters,
    max_position_embeddings=131072,
  )
  reference = transformers.AutoConfig.for_model(**fields)
  init = modeling_rope_utils.ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
  expected, scale = init(reference, device="cpu")

  got = decoder_config.from_hf(fields).rope

  # transformers computes in float32, we in float64.
  np.testing.assert_allclose(got.frequencies(), expected.numpy(), rtol=1e-5)
  amplitude = 1.0
  if isinstance(got.scaling, rope.Yarn):
    amplitude = got.scaling.amplitude
  assert amplitude == pytest.approx(scale, rel=1e-6)
