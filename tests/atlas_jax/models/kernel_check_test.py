# SPDX-License-Identifier: Apache-2.0
"""A kernel that ignores its mask is rejected before training."""

import jax
import jax.numpy as jnp
import pytest

from atlas_jax import errors
from atlas_jax.models import kernel_check, kernels
from tests import tiny


def _blind(kernel, mask, queries):
  """Causal attention that ignores segments."""
  if kernel != "cudnn":
    return _MAKE(kernel, mask, queries)
  one_segment = jnp.ones_like(queries.segment_ids_BT)
  in_row = jnp.broadcast_to(jnp.arange(one_segment.shape[1]), one_segment.shape)
  row = kernels.Tokens(in_row, one_segment)
  return _MAKE("reference", mask, row)


def _exact(kernel, mask, queries):
  del kernel
  return _MAKE("reference", mask, queries)


_MAKE = kernels.make


@pytest.fixture(autouse=True)
def _forget():
  """Clears compiled functions, which contain the kernel of a test."""
  jax.clear_caches()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernel_that_ignores_segments_is_rejected(monkeypatch, dtype):
  config = tiny.build("gemma2").config
  monkeypatch.setattr(kernels, "make", _blind)
  with pytest.raises(errors.ConfigError, match="attention=cudnn"):
    kernel_check.require("cudnn", config, jnp.dtype(dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounding_errors_are_accepted(monkeypatch, dtype):
  config = tiny.build("gemma2").config
  monkeypatch.setattr(kernels, "make", _exact)
  kernel_check.require("cudnn", config, jnp.dtype(dtype))
