# SPDX-License-Identifier: Apache-2.0
"""Tests the limit on prompt plus completion tokens."""

import pytest

from atlas_jax import errors, types
from rollout import context_length


@pytest.mark.parametrize(
  ("num_tokens", "fits"), [(0, False), (1, True), (6, True), (7, False)]
)
def test_prompt_plus_completion_must_fit_the_context(num_tokens, fits):
  assert context_length.fits(num_tokens, 4, 10) == fits


def test_the_error_names_the_row_and_the_limit():
  prompts = [types.Prompt(str(n), "", (1,) * n) for n in (6, 7)]
  with pytest.raises(
    errors.ConfigError, match="1 to 6 tokens, got 7"
  ) as caught:
    context_length.check(prompts, 4, 10, limit_name="max_model_len")
  assert caught.value.where == "row 7"
  assert "max_model_len is 10" in caught.value.why
