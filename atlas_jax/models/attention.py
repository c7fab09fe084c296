# SPDX-License-Identifier: Apache-2.0
"""Projections of grouped-query attention, and the KV cache."""

from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from atlas_jax.models import decoder_config, layers, rope


class Cache(NamedTuple):
  """KV cache: keys and values [B, K, S, H] per layer, positions and segments.

  All rows of a batch write the same slot in the same step, whatever their own
  positions are. Each layer has separate arrays, so that a step updates its slot
  in place without copies.
  """

  keys: tuple[jax.Array, ...]
  values: tuple[jax.Array, ...]
  positions_BS: jax.Array
  segment_ids_BS: jax.Array


def empty_cache(
  config: decoder_config.DecoderConfig,
  batch_size: int,
  num_slots: int,
  dtype: jnp.dtype,
) -> Cache:
  """Returns a cache in which every slot is padding."""
  shape = (batch_size, config.num_kv_heads, num_slots, config.head_width)
  slots_BS = jnp.zeros((batch_size, num_slots), jnp.int32)
  layers_BKSH = (jnp.zeros(shape, dtype),) * config.num_layers
  return Cache(layers_BKSH, layers_BKSH, slots_BS, slots_BS)


class Attention(nnx.Module):
  """Grouped-query attention with rotary positions.

  Source: Ainslie et al., arXiv:2305.13245.
  """

  def __init__(
    self,
    config: decoder_config.DecoderConfig,
    *,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
  ) -> None:
    """Draws the four projections."""
    heads = (config.num_heads, config.head_width)
    kv_heads = (config.num_kv_heads, config.head_width)
    kwargs = {"scale": config.initializer_range, "dtype": dtype, "rngs": rngs}
    bias, width = config.qkv_bias, (config.width,)
    self.q = layers.Linear(width, heads, use_bias=bias, **kwargs)
    self.k = layers.Linear(width, kv_heads, use_bias=bias, **kwargs)
    self.v = layers.Linear(width, kv_heads, use_bias=bias, **kwargs)
    self.o = layers.Linear(heads, width, use_bias=config.out_bias, **kwargs)

    def norm() -> layers.RMSNorm | None:
      if not config.qk_norm:
        return None
      return layers.RMSNorm(
        config.head_width,
        epsilon=config.norm_epsilon,
        zero_centered=config.zero_centered_norms,
        dtype=dtype,
      )

    self.q_norm, self.k_norm = norm(), norm()

  def project(
    self, x_BTD: jax.Array, turns: rope.Turns
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns queries, keys and values; RoPE is applied to the former two."""
    q_BTNH, k_BTKH, v_BTKH = self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)
    if self.q_norm is not None and self.k_norm is not None:
      q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
    return rope.rotate(q_BTNH, turns), rope.rotate(k_BTKH, turns), v_BTKH
