# SPDX-License-Identifier: Apache-2.0
"""Rotary positions, grouped-query attention and the KV cache.

One description of the mask serves training, prefill and decoding: a query sees
the keys of its own segment at positions up to its own. Segment 0 is padding.
"""

from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax.models import config as model_config
from atlas_jax.models import layers


class Cache(NamedTuple):
  """Keys and values of all layers, and where each slot belongs.

  Slots are shared by the rows of a batch: every row writes the same slot in
  the same step, whatever its own position is.
  """

  keys_LBSKH: jax.Array
  values_LBSKH: jax.Array
  positions_BS: jax.Array
  segment_ids_BS: jax.Array


def empty_cache(
  config: model_config.DecoderConfig,
  batch_size: int,
  num_slots: int,
  dtype: jnp.dtype,
) -> Cache:
  """Makes a cache in which every slot is padding."""
  shape = (
    config.num_layers,
    batch_size,
    num_slots,
    config.num_kv_heads,
    config.head_width,
  )
  slots_BS = jnp.zeros((batch_size, num_slots), jnp.int32)
  return Cache(
    jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), slots_BS, slots_BS
  )


def rope_frequencies(config: model_config.DecoderConfig) -> np.ndarray:
  """Computes the angle per position of each pair of a head, float32[H / 2].

  With Llama 3's scaling, wavelengths longer than the original context divided
  by `low_freq_factor` are stretched by `factor`, those shorter than it divided
  by `high_freq_factor` are kept, and those between are interpolated.

  Source: Su et al., arXiv:2104.09864; Llama 3.1's reference code for the
  scaling.
  """
  exponent = np.arange(0, config.head_width, 2) / config.head_width
  frequencies = 1.0 / config.rope_theta**exponent
  scaling = config.rope_scaling
  if scaling is not None:
    wavelength = 2.0 * np.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (scaling.original_max_positions / wavelength - low) / (high - low)
    smooth = np.clip(smooth, 0.0, 1.0)
    stretched = frequencies / scaling.factor
    frequencies = (1.0 - smooth) * stretched + smooth * frequencies
  return frequencies.astype(np.float32)


def rotate(
  x_BTNH: jax.Array, positions_BT: jax.Array, frequencies: np.ndarray
) -> jax.Array:
  """Turns pair (i, i + H / 2) of each head by position times frequency i."""
  angles = positions_BT[..., None, None].astype(jnp.float32) * frequencies
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return turned.astype(x_BTNH.dtype)


def causal_mask(
  positions_BT: jax.Array,
  segment_ids_BT: jax.Array,
  key_positions_BS: jax.Array,
  key_segment_ids_BS: jax.Array,
) -> jax.Array:
  """Tells which keys each query sees, bool[B, T, S]."""
  same_segment = (
    segment_ids_BT[:, :, None] == key_segment_ids_BS[:, None, :]
  ) & (key_segment_ids_BS[:, None, :] > 0)
  return same_segment & (
    key_positions_BS[:, None, :] <= positions_BT[:, :, None]
  )


class Attention(nnx.Module):
  """Grouped-query attention with rotary positions.

  Source: Ainslie et al., arXiv:2305.13245.
  """

  def __init__(
    self,
    config: model_config.DecoderConfig,
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
    self.o = layers.Linear(heads, width, use_bias=False, **kwargs)

    def norm() -> layers.RMSNorm | None:
      if not config.qk_norm:
        return None
      epsilon = config.norm_epsilon
      return layers.RMSNorm(config.head_width, epsilon=epsilon, dtype=dtype)

    self.q_norm, self.k_norm = norm(), norm()
    self._frequencies = tuple(rope_frequencies(config).tolist())

  def project(
    self, x_BTD: jax.Array, positions_BT: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes queries, keys and values, turned to their positions."""
    q_BTNH, k_BTKH, v_BTKH = self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)
    if self.q_norm is not None and self.k_norm is not None:
      q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
    frequencies = np.asarray(self._frequencies, np.float32)
    q_BTNH = rotate(q_BTNH, positions_BT, frequencies)
    k_BTKH = rotate(k_BTKH, positions_BT, frequencies)
    return q_BTNH, k_BTKH, v_BTKH

  def attend(
    self,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
  ) -> jax.Array:
    """Mixes the values each query sees; the softmax is in float32."""
    mixed_BTNH = jax.nn.dot_product_attention(
      q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS[:, None], implementation="xla"
    )
    return self.o(mixed_BTNH)
