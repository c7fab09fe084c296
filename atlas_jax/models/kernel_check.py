# SPDX-License-Identifier: Apache-2.0
"""Whether a kernel does what its mask says, on the device at hand."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax import errors
from atlas_jax.models import decoder_config, kernels

# Kernels that are compiled from what is written here need no check.
_OWN = ("reference", "xla")
# Of the norm: rounding to bfloat16 costs about 0.005; one segment that sees
# another, several tenths.
TOLERANCE = 0.03
_NUM_TOKENS = 512


class Case(NamedTuple):
  """What attends, and how it is laid out in packed rows.

  `lengths` are of the segments of each row, padding behind them.
  """

  mask: kernels.Mask
  num_heads: int
  num_kv_heads: int
  head_width: int
  dtype: jnp.dtype
  lengths: tuple[tuple[int, ...], ...]
  num_tokens: int


def draw(case: Case) -> tuple[kernels.Tokens, list[jax.Array]]:
  """Draws queries, keys, values and the weights of a loss, 0 on padding."""
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
  """Computes mixed values, and the gradients of queries, keys and values."""
  *qkv, weights = arrays

  def loss(*qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
    mixed = kernels.make(kernel, case.mask, tokens)(*qkv)
    mixed = mixed * (tokens.segment_ids_BT > 0)[:, :, None, None]
    return jnp.sum(weights.astype(jnp.float32) * mixed), mixed

  gradients, mixed = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*qkv)
  return mixed, *gradients


def differences(kernel: kernels.Kernel, case: Case) -> list[float]:
  """Compares values and gradients with the reference in float32.

  Returns:
    Of values and of the gradients of queries, keys and values: the norm of the
    difference, as a part of that of the reference.
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
  """Refuses a kernel that does not compute a model's attention here.

  Raises:
    errors.ConfigError: if packed rows come out otherwise than by the reference.
  """
  if kernel in _OWN:
    return
  for window in {config.window, None}:
    mask = kernels.Mask(
      window, config.attention_scale, config.attention_soft_cap
    )
    case = Case(
      mask,
      *(config.num_heads, config.num_kv_heads, config.head_width, dtype),
      lengths=((200, 57, 200), (_NUM_TOKENS,)),
      num_tokens=_NUM_TOKENS,
    )
    found = differences(kernel, case)
    if not max(found) < TOLERANCE:  # So that NaN is refused.
      told = ", ".join(f"{x:.3g}" for x in found)
      raise errors.ConfigError(
        "The attention kernel does not compute this model.",
        where=f"--config.model.attention={kernel}, window={window}",
        why=f"Values and gradients of packed rows are off by {told} of their "
        f"norm; {TOLERANCE} is rounding.",
        fix="Set --config.model.attention=xla, and run "
        "scripts.check_attention on this machine.",
      )
