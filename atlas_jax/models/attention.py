# SPDX-License-Identifier: Apache-2.0
"""Grouped-query attention, what each token sees, and the KV cache.

One description of the mask serves training, prefill and decoding: a query sees
the keys of its own segment at positions up to its own, or the last few of
them. Segment 0 is padding.
"""

from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from atlas_jax.models import config as model_config
from atlas_jax.models import layers, rope


class Cache(NamedTuple):
  """Keys and values [B, K, S, H] of each layer, and where slots belong.

  Slots are shared by the rows of a batch: every row writes the same slot in
  the same step, whatever its own position is. Layers are arrays of their own,
  so that a step writes its slot in place and copies nothing.
  """

  keys: tuple[jax.Array, ...]
  values: tuple[jax.Array, ...]
  positions_BS: jax.Array
  segment_ids_BS: jax.Array


def empty_cache(
  config: model_config.DecoderConfig,
  batch_size: int,
  num_slots: int,
  dtype: jnp.dtype,
) -> Cache:
  """Makes a cache in which every slot is padding."""
  shape = (batch_size, config.num_kv_heads, num_slots, config.head_width)
  slots_BS = jnp.zeros((batch_size, num_slots), jnp.int32)
  layers_BKSH = (jnp.zeros(shape, dtype),) * config.num_layers
  return Cache(layers_BKSH, layers_BKSH, slots_BS, slots_BS)


def causal_mask(
  positions_BT: jax.Array,
  segment_ids_BT: jax.Array,
  key_positions_BS: jax.Array,
  key_segment_ids_BS: jax.Array,
  *,
  window: int | None,
) -> jax.Array:
  """Tells which keys each query sees, bool[B, T, S].

  With a `window` these are as many positions, its own included.
  """
  same_segment = (
    segment_ids_BT[:, :, None] == key_segment_ids_BS[:, None, :]
  ) & (key_segment_ids_BS[:, None, :] > 0)
  distance_BTS = positions_BT[:, :, None] - key_positions_BS[:, None, :]
  near = distance_BTS >= 0
  if window is not None:
    near &= distance_BTS < window
  return same_segment & near


def attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  mask_BTS: jax.Array,
  *,
  scale: float,
  soft_cap: float | None,
) -> jax.Array:
  """Mixes the values each query sees; the softmax is in float32.

  A query that sees nothing gets an arbitrary mixture.
  """
  if soft_cap is None:
    return jax.nn.dot_product_attention(
      *(q_BTNH, k_BSKH, v_BSKH),
      mask=mask_BTS[:, None],
      scale=scale,
      implementation="xla",
    )
  # jax.nn has no soft cap.
  return attend_cached(
    q_BTNH,
    k_BSKH.swapaxes(1, 2),
    v_BSKH.swapaxes(1, 2),
    mask_BTS,
    scale=scale,
    soft_cap=soft_cap,
  )


def attend_cached(
  q_BTNH: jax.Array,
  k_BKSH: jax.Array,
  v_BKSH: jax.Array,
  mask_BTS: jax.Array,
  *,
  scale: float,
  soft_cap: float | None,
) -> jax.Array:
  """Does what `attend` does, with heads before slots as a cache keeps them."""
  batch_size, num_new, _, width = q_BTNH.shape
  num_kv_heads, num_slots = k_BKSH.shape[1:3]
  # The queries of a group, and all new tokens, are the rows of one product.
  q_BTKGH = q_BTNH.reshape(batch_size, num_new, num_kv_heads, -1, width)
  q_BKMH = q_BTKGH.transpose(0, 2, 3, 1, 4).reshape(
    batch_size, num_kv_heads, -1, width
  )
  scores_BKMS = scale * jnp.einsum(
    "BKMH,BKSH->BKMS", q_BKMH, k_BKSH, preferred_element_type=jnp.float32
  )
  scores_BKGTS = layers.soft_cap(scores_BKMS, soft_cap).reshape(
    batch_size, num_kv_heads, -1, num_new, num_slots
  )
  lowest = jnp.finfo(jnp.float32).min
  scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, lowest)
  weights_BKGTS = jax.nn.softmax(scores_BKGTS).astype(v_BKSH.dtype)
  weights_BKMS = weights_BKGTS.reshape(scores_BKMS.shape)
  mixed_BKMH = jnp.einsum("BKMS,BKSH->BKMH", weights_BKMS, v_BKSH)
  mixed_BKGTH = mixed_BKMH.reshape(batch_size, num_kv_heads, -1, num_new, width)
  return mixed_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)


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
    self._scale = config.attention_scale
    self._soft_cap = config.attention_soft_cap

  def project(
    self, x_BTD: jax.Array, turns: rope.Turns
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes queries, keys and values, turned to their positions."""
    q_BTNH, k_BTKH, v_BTKH = self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)
    if self.q_norm is not None and self.k_norm is not None:
      q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
    return rope.rotate(q_BTNH, turns), rope.rotate(k_BTKH, turns), v_BTKH

  def attend(
    self,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
  ) -> jax.Array:
    """Mixes values, and projects them back to the residual stream."""
    kwargs = {"scale": self._scale, "soft_cap": self._soft_cap}
    return self.o(attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS, **kwargs))

  def attend_cached(
    self,
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    mask_BTS: jax.Array,
  ) -> jax.Array:
    """Does the same with what is in a cache."""
    kwargs = {"scale": self._scale, "soft_cap": self._soft_cap}
    return self.o(attend_cached(q_BTNH, k_BKSH, v_BKSH, mask_BTS, **kwargs))
