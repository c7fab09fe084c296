# SPDX-License-Identifier: Apache-2.0
"""Sampling takes as long as reading memory, or as computing."""

import math

import jax
import pytest

from atlas_jax.train.telemetry import flops
from conversion import load
from scripts.plan import sampling
from tests import tiny

_MODEL = tiny.build("qwen2")
_NUM_WEIGHTS = sum(
  math.prod(x.shape) for x in jax.tree.leaves(load.describe(_MODEL, "bfloat16"))
)
_PHASE = sampling.Phase("teach", 12, prompt_tokens=20, new_tokens=40)


def _seconds(phase=_PHASE, **changes):
  device = sampling.Device(
    bandwidth=changes.pop("bandwidth", 1e9),
    peak_flops=changes.pop("peak_flops", math.inf),
  )
  split = {"num_devices": 2, "num_shards": 1, "max_rows": 8, **changes}
  return sampling.of_phase(phase, _MODEL, "bfloat16", device, **split)


def test_decoding_reads_the_weights_and_the_cache_for_every_token():
  shape = _MODEL.config
  # Keys and values of 2 bytes, after 20 prompt tokens and half of the new ones.
  cache = 2 * 2 * shape.num_layers * shape.num_kv_heads * shape.head_width * 40
  # Two batches of 6 rows, of which a device has 3; 40 steps each.
  expected = 2 * 40 * (2 * _NUM_WEIGHTS + 3 * cache) / 1e9
  assert _seconds() == pytest.approx(expected)
  weights = 2 * 40 * _NUM_WEIGHTS / 1e9
  assert _seconds(num_shards=2) == pytest.approx(expected - weights)


def test_decoding_is_bound_by_computation_if_that_takes_longer():
  of_token = flops.of_forward(_MODEL.config, [40]) / 40
  seconds = _seconds(bandwidth=1e30, peak_flops=1e6)
  assert seconds == pytest.approx(2 * 40 * 3 * of_token / 1e6)
  assert _seconds(peak_flops=1e30) == _seconds()
