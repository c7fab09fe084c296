# SPDX-License-Identifier: Apache-2.0
"""Checks an attention kernel against the reference on the current device."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax import errors
from atlas_jax.models import decoder_config, kernels

# These kernels are compiled from the code in `kernels` and need no check.
_OWN = ("reference", "xla")
# Relative error. Rounding to bfloat16 contributes about 0.005; attention across
# segments, several tenths.
TOLERANCE = 0.03
_NUM_TOKENS = 512


class Case(NamedTuple):
  """An attention problem on packed rows.

  `lengths` holds the segment lengths of each row; padding follows them.
  """

  mask: kernels.Mask
  num_heads: int
  num_kv_heads: int
  head_width: int
  dtype: jnp.dtype
  lengths: tuple[tuple[int, ...], ...]
  num_tokens: int


def draw(case: Case) -> tuple[kernels.Tokens, list[jax.Array]]:
  """Draws queries, keys, values and loss weights; weights are 0 on padding."""
  ids_BT = np.zeros((len(case.lengths), case.num_tokens), np.int32)
  positions_BT = np.zeros_like(ids_BT)
  for row, sizes in enumerate(case.lengths):
    start = 0
    for segment, size in enumerate(sizes, start=1):
      ids_BT[row, start : start + size] = segment
      positions_BT[row, start : start + size] = np.arange(size)
      start += size
  shape = (len(case.lengths), case.num_tokens, case.num_heads, case.head_width)
  kv_shape = (shape[0], case.num_kv_heads, case.num_tokens, case.head_width)
  keys = jax.random.split(jax.random.key(0), 4)
  arrays = [
    jax.random.normal(key, size).astype(case.dtype)
    for key, size in zip(keys, (shape, kv_shape, kv_shape, shape), strict=True)
  ]
  arrays[3] *= (ids_BT > 0)[:, :, None, None]
  tokens = kernels.Tokens(jnp.asarray(positions_BT), jnp.asarray(ids_BT))
  return tokens, arrays


def attend(
  kernel: kernels.Kernel,
  case: Case,
  tokens: kernels.Tokens,
  arrays: list[jax.Array],
) -> tuple[jax.Array, ...]:
  """Computes outputs and the gradients of queries, keys and values."""
  *qkv, weights = arrays

  def loss(*qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
    mixed = kernels.make(kernel, case.mask, tokens)(*qkv)
    mixed = mixed * (tokens.segment_ids_BT > 0)[:, :, None, None]
    return jnp.sum(weights.astype(jnp.float32) * mixed), mixed

  gradients, mixed = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*qkv)
  return mixed, *gradients


def differences(kernel: kernels.Kernel, case: Case) -> list[float]:
  """Compares outputs and gradients with the float32 reference kernel.

  Returns:
    The relative errors |got - want| / |want| of the outputs and of the
    gradients of queries, keys and values.
  """
  tokens, arrays = draw(case)

  def run(
    kernel: kernels.Kernel, arrays: list[jax.Array]
  ) -> tuple[jax.Array, ...]:
    return jax.jit(functools.partial(attend, kernel, case))(tokens, arrays)

  exact = run("reference", [x.astype(jnp.float32) for x in arrays])
  found = run(kernel, arrays)
  return [
    float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
    for got, want in zip(found, exact, strict=True)
  ]


def require(
  kernel: kernels.Kernel, config: decoder_config.DecoderConfig, dtype: jnp.dtype
) -> None:
  """Validates a kernel on a model's attention shapes and masks.

  Raises:
    errors.ConfigError: if its results on packed rows differ from the reference.
  """
  if kernel in _OWN:
    return
  for window in {config.window, None}:
    mask = kernels.Mask(
      window, config.attention_scale, config.attention_soft_cap
    )
    case = Case(
      mask,
      num_heads=config.num_heads,
      num_kv_heads=config.num_kv_heads,
      head_width=config.head_width,
      dtype=dtype,
      lengths=((200, 57, 200), (_NUM_TOKENS,)),
      num_tokens=_NUM_TOKENS,
    )
    found = differences(kernel, case)
    if not max(found) < TOLERANCE:  # Negated, so that NaN fails too.
      listed = ", ".join(f"{x:.3g}" for x in found)
      raise errors.ConfigError(
        f"Attention kernel {kernel!r} computes wrong results for this model.",
        where=f"--config.model.attention={kernel}, window={window}",
        why="Relative errors of outputs and gradients on packed rows are "
        f"{listed}; rounding explains up to {TOLERANCE}.",
        fix="Set --config.model.attention=xla, and run "
        "scripts.check_attention on this machine.",
      )
