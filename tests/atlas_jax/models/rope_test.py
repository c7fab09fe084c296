# SPDX-License-Identifier: Apache-2.0
"""Invariances of rotary positions, and rejected fields."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.models import rope
from tests import tiny


def _plain(width=8):
  return rope.Rope(theta=10_000.0, width=width, scaling=None)


def _rotated_dot(given, q, k, q_position, k_position):
  def at(x, position):
    return rope.rotate(
      x[None, None, None], given.turns(jnp.array([[position]]))
    )

  return float(jnp.vdot(at(q, q_position), at(k, k_position)))


def test_rotation_depends_on_relative_position_only():
  given = tiny.build("llama").config.rope
  q, k = jax.random.normal(jax.random.key(0), (2, given.width))

  near = _rotated_dot(given, q, k, 7, 3)

  assert _rotated_dot(given, q, k, 107, 103) == pytest.approx(near, rel=1e-4)
  assert abs(_rotated_dot(given, q, k, 8, 3) - near) > 1e-3


def test_rotation_at_position_zero_is_the_identity():
  x = jax.random.normal(jax.random.key(0), (1, 2, 3, 8))
  got = rope.rotate(x, _plain().turns(jnp.zeros((1, 2), jnp.int32)))
  np.testing.assert_array_equal(got, x)


def test_rotation_keeps_far_positions_apart_in_bfloat16():
  # bfloat16 has no odd numbers above 256, so angles must not use it.
  x = jnp.ones((1, 2, 1, 8), jnp.bfloat16)
  got = rope.rotate(x, _plain().turns(jnp.array([[4096, 4097]])))
  assert got.dtype == jnp.bfloat16
  assert not np.array_equal(got[0, 0], got[0, 1])


def test_partial_rotary_leaves_the_rest_of_a_head_unchanged():
  x = jax.random.normal(jax.random.key(0), (1, 1, 1, 8))
  got = rope.rotate(x, _plain(width=6).turns(jnp.array([[5]])))
  np.testing.assert_array_equal(got[..., 6:], x[..., 6:])
  assert not np.any(got[..., :6] == x[..., :6])


def test_linear_scaling_divides_positions():
  scaled = rope.Rope(10_000.0, 8, rope.Linear(4.0))
  for got, expected in zip(
    scaled.turns(jnp.array([[12]])),
    _plain().turns(jnp.array([[3]])),
    strict=True,
  ):
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize(
  ("fields", "named"),
  [
    ({"rope_type": "longrope"}, "longrope"),
    ({"rope_type": ["yarn"]}, "yarn"),
    ({"rope_type": "linear"}, "factor"),
    ({"rope_type": "yarn", "factor": 4.0}, "original_max_position"),
    ({"factor": 2.0}, "factor"),
    ({"rope_type": "linear", "factor": 2.0, "mscale": 1.0}, "mscale"),
    (
      {"rope_type": "linear", "factor": -2.0},
      "factor must be positive, got -2.0",
    ),
    ({"rope_theta": "1"}, "rope_theta must be positive, got '1'"),
    ({"rope_theta": float("nan")}, "rope_theta"),
    ({**tiny.LLAMA3_ROPE, "high_freq_factor": 1.0}, "high_freq_factor"),
    ({"partial_rotary_factor": 0.9}, "pairs"),
  ],
)
def test_unknown_or_invalid_fields_are_rejected_by_name(fields, named):
  with pytest.raises(ValueError, match=named):
    rope.from_hf({"rope_theta": 10_000.0, **fields}, head_width=8)
