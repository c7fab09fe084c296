# SPDX-License-Identifier: Apache-2.0
"""The table of rules, in both directions."""

import dataclasses

import numpy as np
import pytest

from conversion import rules
from tests import tiny


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_parameter_round_trips(family, tied):
  model = tiny.build(family, tie_word_embeddings=tied)
  leaves = dict(rules.flatten(model.abstract_params))
  rng = np.random.default_rng(0)
  for rule in rules.of_model(model):
    array = rng.normal(size=leaves[rule.path].shape[rule.num_stacked :])
    file = rules.to_hf(rule, array)
    assert file.shape == rules.hf_shape(rule, array.shape)
    np.testing.assert_array_equal(rules.from_hf(rule, file, array.shape), array)


def test_from_hf_does_not_copy():
  model = tiny.build("qwen2")
  leaves = dict(rules.flatten(model.abstract_params))
  for rule in rules.of_model(model):
    shape = leaves[rule.path].shape[rule.num_stacked :]
    file = np.zeros(rules.hf_shape(rule, shape))
    assert np.shares_memory(rules.from_hf(rule, file, shape), file)


def test_projections_have_outputs_first_in_files():
  shapes = rules.shapes(tiny.build("qwen2"))
  layer = "model.layers.1."
  assert shapes[layer + "self_attn.q_proj.weight"] == (24, 21)
  assert shapes[layer + "self_attn.k_proj.bias"] == (8,)
  assert shapes[layer + "self_attn.o_proj.weight"] == (21, 24)
  assert shapes[layer + "mlp.gate_proj.weight"] == (28, 21)
  assert shapes["model.embed_tokens.weight"] == (37, 21)
  assert shapes["lm_head.weight"] == (37, 21)


def test_parameter_without_a_rule_is_an_error():
  model = tiny.build("qwen2")
  params = {**model.abstract_params, "other": model.abstract_params["head"]}
  with pytest.raises(ValueError, match="other/kernel"):
    rules.of_model(dataclasses.replace(model, abstract_params=params))
