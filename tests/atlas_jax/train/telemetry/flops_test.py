# SPDX-License-Identifier: Apache-2.0
"""FLOPs against the compiler's count and the paper's formula."""

import jax
import numpy as np
import pytest

from atlas_jax.train.telemetry import flops
from tests import tiny


def _leaves(tree):
  return {
    "/".join(key.key for key in path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


@pytest.mark.parametrize("tied", [True, False])
def test_update_flops_match_the_papers_formula(tied):
  model = tiny.build("qwen3", tie_word_embeddings=tied)
  config, length = model.config, 17
  num_params = sum(
    leaf.size
    for name, leaf in _leaves(model.abstract_params).items()
    if name.endswith("kernel") or (tied and name == "embed/embedding")
  )
  # The paper's T is the sequence length; a token attends to half on average.
  num_seen = (length + 1) / 2
  attention = config.num_layers * config.num_heads * config.head_width
  per_token = 6 * num_params + 12 * attention * num_seen
  got = flops.of_update(config, [length], is_base_frozen=False)
  np.testing.assert_allclose(got, per_token * length)


@pytest.mark.parametrize(
  ("family", "changes"), [("qwen2", {}), ("qwen3", {}), ("llama", {})]
)
def test_forward_flops_match_the_compilers_count(family, changes):
  # Wide enough to make norms and rotary embeddings negligible.
  wide = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 1024}
  shape = {**wide, "head_dim": 64, "num_hidden_layers": 1}
  model = tiny.build(family, **shape, **changes)
  batch = tiny.batch(model, 2, 64)
  compiled = jax.jit(model.logits).lower(model.abstract_params, *batch)
  counted = compiled.compile().cost_analysis()["flops"]
  # The compiler also counts the T (T - 1) / 2 masked scores of a sequence.
  config = model.config
  masked = 4 * config.num_heads * config.head_width * 2 * 64 * 63 / 2
  expected = flops.of_forward(config, [64, 64]) + masked
  np.testing.assert_allclose(counted, expected, rtol=0.05)


def test_packed_sequences_cost_what_they_cost_alone():
  config = tiny.build("qwen3").config
  alone = [flops.of_forward(config, [n]) for n in (3, 8)]
  assert flops.of_forward(config, [3, 8]) == sum(alone)
  assert flops.of_forward(config, [11]) > sum(alone)
  assert flops.of_forward(config, []) == 0


def test_lengths_exclude_padding():
  segment_ids_BT = np.array([[1, 1, 2, 0], [1, 2, 2, 3], [0, 0, 0, 0]])
  assert flops.lengths(segment_ids_BT) == [2, 1, 1, 2, 1]


def test_a_window_limits_the_attended_tokens():
  config = tiny.build("gemma2").config  # One local layer, window 5; one not.
  kernels = flops.of_forward(config, [1]) - 2 * 4 * 3 * 8
  for length in (3, 5, 9):
    mask = np.tril(np.ones((length, length)))
    near = np.triu(mask, -(config.window - 1))
    scores = 4 * config.num_heads * config.head_width
    expected = length * kernels + scores * (mask.sum() + near.sum())
    assert flops.of_forward(config, [length]) == expected


def test_only_the_chosen_experts_count():
  model = tiny.build("qwen3_moe")
  config, params = model.config, _leaves(model.abstract_params)
  dense = sum(v.size for k, v in params.items() if k.endswith("kernel"))
  experts = sum(
    v.size
    for k, v in params.items()
    if "mixture" in k and not k.endswith("kernel")
  )
  active = dense + experts * config.experts.num_chosen / config.experts.count
  scores = 4 * config.num_layers * config.num_heads * config.head_width
  assert flops.of_forward(config, [1]) == 2 * active + scores


def test_gradients_of_frozen_kernels_are_not_counted():
  config = tiny.build("qwen2").config
  whole = flops.of_update(config, [4], is_base_frozen=False)
  frozen = flops.of_update(config, [4], is_base_frozen=True)
  scores = 4 * config.num_layers * config.num_heads * config.head_width * 10
  kernels = flops.of_forward(config, [4]) - scores
  assert whole == 3 * flops.of_forward(config, [4])
  assert whole - frozen == kernels


@pytest.mark.parametrize(
  ("kind", "tflops"),
  [
    ("NVIDIA H200", 989.4),
    ("NVIDIA H100 80GB HBM3", 989.4),
    ("NVIDIA H100 PCIe", 756),
    ("NVIDIA A100-SXM4-80GB", 312),
    ("NVIDIA L40S", 362),
    ("NVIDIA L4", 121),
    ("TPU v5 lite", 197),
    ("TPU v5", 459),
    ("cpu", None),
    ("", None),
  ],
)
def test_peaks_are_found_by_device_kind(kind, tflops):
  expected = None if tflops is None else pytest.approx(tflops * 1e12)
  assert flops.peak(kind) == expected
