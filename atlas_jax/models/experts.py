# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-experts layer that drops no tokens."""

from collections.abc import Sequence
import functools
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from atlas_jax.models import decoder_config, layers
from atlas_jax.models import layout as layouts


class Load(NamedTuple):
  """Expert load of a layer, float32[E] each.

  `counts` is the number of tokens routed to each expert, `probs` the sum of its
  router probabilities.
  """

  counts: jax.Array
  probs: jax.Array


def balance_loss(load: Load, num_tokens: jax.Array) -> jax.Array:
  """Computes E sum_e f_e P_e, which is `num_chosen` for a uniform load.

  f_e is the fraction of tokens routed to expert e, P_e its mean router
  probability. Only P has a gradient.

  Source: Fedus et al., arXiv:2101.03961, equations 4 to 6.

  Args:
    load: summed over all layers.
    num_tokens: number of tokens times number of layers.
  """
  shares = load.counts / jnp.maximum(num_tokens, 1.0)
  means = load.probs / jnp.maximum(num_tokens, 1.0)
  return load.counts.shape[0] * jnp.sum(jax.lax.stop_gradient(shares) * means)


class Mixture(nnx.Module):
  """Computes sum_e p_e down_e(silu(gate_e(x)) * up_e(x)) over chosen experts.

  On a mesh with an axis `expert`, each device holds some of the experts:

    all-gather tokens -> apply local experts -> reduce-scatter outputs

  Every device sees the tokens of all devices along that axis, so no token is
  dropped, however uneven the load is.
  """

  def __init__(
    self,
    config: decoder_config.DecoderConfig,
    experts: decoder_config.Experts,
    *,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
  ) -> None:
    """Draws the router and the stacked expert kernels."""
    scale = config.initializer_range
    width, count = config.width, experts.count
    self.router = layers.Linear(
      (width,), (count,), use_bias=False, scale=scale, dtype=dtype, rngs=rngs
    )

    def kernel(*shape: int) -> nnx.Param:
      return nnx.Param(scale * jax.random.normal(rngs.params(), shape))

    self.gate = kernel(count, width, experts.width)
    self.up = kernel(count, width, experts.width)
    self.down = kernel(count, experts.width, width)
    self._experts = experts
    self._activation: decoder_config.Activation = config.activation
    self._dtype = dtype

  def __call__(
    self,
    x_BTD: jax.Array,
    counted_BT: jax.Array,
    layout: layouts.Layout | None,
  ) -> tuple[jax.Array, Load]:
    """Applies the mixture; only tokens in `counted_BT` enter the load."""
    probs_BTE = jax.nn.softmax(self.router(x_BTD).astype(jnp.float32))
    weights_BTC, chosen_BTC = jax.lax.top_k(probs_BTE, self._experts.num_chosen)
    if self._experts.normalise:
      weights_BTC /= jnp.sum(weights_BTC, axis=-1, keepdims=True)
    mixed_BTD = self._mix(
      x_BTD, weights_BTC.astype(self._dtype), chosen_BTC, layout=layout
    )
    one_hot_BTE = jax.nn.one_hot(chosen_BTC, self._experts.count).sum(axis=2)
    counted_BT1 = counted_BT[..., None]
    load = Load(
      jnp.sum(one_hot_BTE, axis=(0, 1), where=counted_BT1),
      jnp.sum(probs_BTE, axis=(0, 1), where=counted_BT1),
    )
    return mixed_BTD, load

  def _mix(
    self,
    x_BTD: jax.Array,
    weights_BTC: jax.Array,
    chosen_BTC: jax.Array,
    *,
    layout: layouts.Layout | None,
  ) -> jax.Array:
    """Routes every token to its experts, across devices if needed."""
    apply = functools.partial(_apply_experts, activation=self._activation)
    kernels = [
      kernel[...].astype(self._dtype)
      for kernel in (self.gate, self.up, self.down)
    ]
    if layout is None or not layouts.divides(x_BTD, layout):
      return apply(x_BTD, weights_BTC, chosen_BTC, kernels, first=0)

    def on_device(
      x_BTD: jax.Array,
      weights_BTC: jax.Array,
      chosen_BTC: jax.Array,
      kernels: Sequence[jax.Array],
    ) -> jax.Array:
      gather = functools.partial(
        jax.lax.all_gather, axis_name="expert", tiled=True
      )
      first = jax.lax.axis_index("expert") * len(kernels[0])
      mixed_BTD = apply(
        gather(x_BTD),
        gather(weights_BTC),
        gather(chosen_BTC),
        kernels,
        first=first,
      )
      mixed_BTD = jax.lax.psum(mixed_BTD, "tensor")
      return jax.lax.psum_scatter(mixed_BTD, "expert", tiled=True)

    wide, narrow = jax.P("expert", None, "tensor"), jax.P("expert", "tensor")
    return jax.shard_map(
      on_device,
      mesh=layout.mesh,
      in_specs=(*(layout.spec,) * 3, [wide, wide, narrow]),
      out_specs=layout.spec,
    )(x_BTD, weights_BTC, chosen_BTC, kernels)


def _apply_experts(
  x_BTD: jax.Array,
  weights_BTC: jax.Array,
  chosen_BTC: jax.Array,
  kernels: Sequence[jax.Array],
  *,
  first: jax.typing.ArrayLike,
  activation: decoder_config.Activation,
) -> jax.Array:
  """Returns, for each token, the weighted sum over its local experts.

  Tokens are sorted by expert, so that each expert computes one product. With
  E = 2 local experts, 3 tokens and C = 2 choices for each:

    chosen_Y  0 2 | 1 0 | 2 1    2 = len(gate): not a local expert
    order_Y   0 3 | 2 5 | 1 4    slots of expert 0, of expert 1, the rest
    token_Y   0 1 | 1 2 | 0 2    order_Y // C
    sizes_E   2, 2

  Args:
    x_BTD: inputs.
    weights_BTC: weights of the expert outputs.
    chosen_BTC: global indices of the experts that each token chose.
    kernels: gate, up and down of the local experts, stacked.
    first: global index of the first local expert. Experts on other devices
      are left out of the sum.
    activation: of the gate.
  """
  gate, up, down = kernels
  x_XD = x_BTD.reshape(-1, x_BTD.shape[-1])
  chosen_Y = chosen_BTC.reshape(-1) - first
  is_here_Y = (chosen_Y >= 0) & (chosen_Y < len(gate))
  chosen_Y = jnp.where(is_here_Y, chosen_Y, len(gate))
  order_Y = jnp.argsort(chosen_Y, stable=True)
  token_Y = order_Y // chosen_BTC.shape[-1]
  sizes_E = jnp.bincount(chosen_Y, length=len(gate)).astype(jnp.int32)
  # Slots of non-local experts are sorted last and belong to no group, where
  # the output of `ragged_dot` is undefined: mask them before and after.
  is_here_Y1 = is_here_Y[order_Y][:, None]
  y_YD = jnp.where(is_here_Y1, x_XD[token_Y], 0)
  gate_YF = jax.lax.ragged_dot(y_YD, gate, sizes_E)
  gate_YF = layers.activate(gate_YF, activation)
  y_YF = gate_YF * jax.lax.ragged_dot(y_YD, up, sizes_E)
  y_YD = jax.lax.ragged_dot(y_YF, down, sizes_E)
  y_YD = y_YD * weights_BTC.reshape(-1)[order_Y][:, None]
  y_YD = jnp.where(is_here_Y1, y_YD, 0)
  return jnp.zeros_like(x_XD).at[token_Y].add(y_YD).reshape(x_BTD.shape)
