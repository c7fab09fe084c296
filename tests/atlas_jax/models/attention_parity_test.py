# SPDX-License-Identifier: Apache-2.0
"""Rotary frequencies against transformers."""

import numpy as np
import pytest

from atlas_jax.models import attention, config
from tests import tiny

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


# The last is the shape of Llama 3.1 and 3.2.
@pytest.mark.parametrize(
  ("head_dim", "original", "factor"),
  [(8, 16, 8.0), (64, 512, 32.0), (128, 8192, 8.0)],
)
def test_llama3_frequencies_equal_those_of_transformers(
  head_dim, original, factor
):
  from transformers import modeling_rope_utils

  rope = {
    **tiny.LLAMA3_ROPE,
    "factor": factor,
    "original_max_position_embeddings": original,
  }
  fields = tiny.fields(
    "llama",
    head_dim=head_dim,
    rope_parameters=rope,
    max_position_embeddings=16 * original,
  )
  reference = transformers.AutoConfig.for_model(**fields)
  init = modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"]
  expected, scale = init(reference, device="cpu")

  got = attention.rope_frequencies(config.from_hf(fields))

  assert scale == 1.0
  np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5)
