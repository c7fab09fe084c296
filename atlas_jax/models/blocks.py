# SPDX-License-Identifier: Apache-2.0
"""One layer of the decoder: attention and MLP on the residual stream."""

from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from atlas_jax.models import attention, decoder_config, experts, kernels, layers
from atlas_jax.models import layout as layouts
from atlas_jax.models import rope as rope_lib


class View(NamedTuple):
  """RoPE angles, attention function and padding, shared by similar layers."""

  turns: rope_lib.Turns
  attend: kernels.Attend
  counted_BT: jax.Array  # False on padding.


class Block(nnx.Module):
  """Attention and MLP, each applied to the normalised residual stream."""

  def __init__(
    self,
    config: decoder_config.DecoderConfig,
    *,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
  ) -> None:
    """Builds attention, MLP or mixture, and norms."""

    def norm() -> layers.RMSNorm:
      return layers.RMSNorm(
        config.width,
        epsilon=config.norm_epsilon,
        zero_centered=config.zero_centered_norms,
        dtype=dtype,
      )

    self.attention_norm, self.mlp_norm = norm(), norm()
    if config.post_norms:
      self.attention_post_norm, self.mlp_post_norm = norm(), norm()
    self.attention = attention.Attention(config, dtype=dtype, rngs=rngs)
    if config.experts:
      self.mixture = experts.Mixture(
        config, config.experts, dtype=dtype, rngs=rngs
      )
    else:
      self.mlp = layers.GatedMLP(
        config.width,
        config.mlp_width,
        activation=config.activation,
        scale=config.initializer_range,
        dtype=dtype,
        rngs=rngs,
      )
    self._config = config

  def __call__(
    self, x_BTD: jax.Array, view: View, layout: layouts.Layout | None
  ) -> tuple[jax.Array, experts.Load | None]:
    """Applies the block to whole sequences, sharded as `layout` describes."""
    q_BTNH, k_BTKH, v_BTKH = self._qkv(x_BTD, view)
    k_BTKH = layouts.gather_tokens(k_BTKH, layout)
    v_BTKH = layouts.gather_tokens(v_BTKH, layout)
    mixed_BTNH = view.attend(
      q_BTNH, k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    )
    x_BTD, load = self._finish(x_BTD, mixed_BTNH, view, layout)
    return layouts.spread(x_BTD, layout), load

  def cached(
    self,
    x_BTD: jax.Array,
    view: View,
    keys_BKSH: jax.Array,
    values_BKSH: jax.Array,
    slot: jax.Array,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Applies the block to new tokens; writes their keys and values to cache.

    Slots from `slot` on are overwritten.
    """

    def write(seen_BKSH: jax.Array, new_BTKH: jax.Array) -> jax.Array:
      new_BKTH = new_BTKH.swapaxes(1, 2).astype(seen_BKSH.dtype)
      return jax.lax.dynamic_update_slice_in_dim(
        seen_BKSH, new_BKTH, slot, axis=2
      )

    q_BTNH, k_BTKH, v_BTKH = self._qkv(x_BTD, view)
    seen = write(keys_BKSH, k_BTKH), write(values_BKSH, v_BTKH)
    x_BTD, _ = self._finish(x_BTD, view.attend(q_BTNH, *seen), view, None)
    return x_BTD, *seen

  def _qkv(
    self, x_BTD: jax.Array, view: View
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    return self.attention.project(self.attention_norm(x_BTD), view.turns)

  def _finish(
    self,
    x_BTD: jax.Array,
    mixed_BTNH: jax.Array,
    view: View,
    layout: layouts.Layout | None,
  ) -> tuple[jax.Array, experts.Load | None]:
    """Adds the outputs of attention and then of the MLP to the residual."""
    added_BTD = self.attention.o(mixed_BTNH)
    if self._config.post_norms:
      added_BTD = self.attention_post_norm(added_BTD)
    x_BTD = x_BTD + added_BTD

    normed_BTD, load = self.mlp_norm(x_BTD), None
    if self._config.experts:
      added_BTD, load = self.mixture(normed_BTD, view.counted_BT, layout)
    else:
      added_BTD = self.mlp(normed_BTD)
    if self._config.post_norms:
      added_BTD = self.mlp_post_norm(added_BTD)
    return x_BTD + added_BTD, load
