# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts in place of the MLP, without dropped tokens."""

from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from atlas_jax.models import config as model_config
from atlas_jax.models import layers


class Load(NamedTuple):
  """How a layer spread its tokens over its experts, float32[E] each.

  `counts` are of tokens that chose the expert, `probs` the sums of the router's
  probabilities.
  """

  counts: jax.Array
  probs: jax.Array


def balance_loss(load: Load, num_tokens: jax.Array) -> jax.Array:
  """Computes E sum_e f_e P_e: 1 x `num_chosen` where experts share evenly.

  f_e is the share of tokens that chose expert e, P_e its mean probability.
  The gradient flows through P alone.

  Source: Fedus et al., arXiv:2101.03961, equations 4 to 6.

  Args:
    load: summed over all layers.
    num_tokens: times the number of layers.
  """
  shares = load.counts / jnp.maximum(num_tokens, 1.0)
  means = load.probs / jnp.maximum(num_tokens, 1.0)
  return load.counts.shape[0] * jnp.sum(jax.lax.stop_gradient(shares) * means)


class Mixture(nnx.Module):
  """sum over chosen experts e of p_e down_e(silu(gate_e(x)) * up_e(x)).

  Tokens are sorted by expert, so that each expert's are one product.
  """

  def __init__(
    self,
    config: model_config.DecoderConfig,
    experts: model_config.Experts,
    *,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
  ) -> None:
    """Draws the router and the stacked kernels of all experts."""
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
    self._activation: model_config.Activation = config.activation
    self._dtype = dtype

  def __call__(
    self, x_BTD: jax.Array, counted_BT: jax.Array
  ) -> tuple[jax.Array, Load]:
    """Applies the mixture; tokens that are not `counted` make no load."""
    x_XD = x_BTD.reshape(-1, x_BTD.shape[-1])
    probs_XE = jax.nn.softmax(self.router(x_XD).astype(jnp.float32))
    weights_XC, chosen_XC = jax.lax.top_k(probs_XE, self._experts.num_chosen)
    if self._experts.normalise:
      weights_XC /= jnp.sum(weights_XC, axis=-1, keepdims=True)
    mixed_XD = self._apply(x_XD, weights_XC.astype(self._dtype), chosen_XC)
    counted_X1 = counted_BT.reshape(-1, 1)
    one_hot_XE = jax.nn.one_hot(chosen_XC, self._experts.count).sum(axis=1)
    load = Load(
      jnp.sum(one_hot_XE, axis=0, where=counted_X1),
      jnp.sum(probs_XE, axis=0, where=counted_X1),
    )
    return mixed_XD.reshape(x_BTD.shape), load

  def _apply(
    self, x_XD: jax.Array, weights_XC: jax.Array, chosen_XC: jax.Array
  ) -> jax.Array:
    """Sends every token to its experts and adds up what they answer."""
    num_chosen = chosen_XC.shape[1]
    order_Y = jnp.argsort(chosen_XC.reshape(-1), stable=True)
    sizes_E = jnp.bincount(
      chosen_XC.reshape(-1), length=self._experts.count
    ).astype(jnp.int32)
    token_Y = order_Y // num_chosen

    def product(y_YD: jax.Array, kernel: nnx.Param) -> jax.Array:
      return jax.lax.ragged_dot(y_YD, kernel[...].astype(self._dtype), sizes_E)

    y_YD = x_XD[token_Y]
    gate_YF = layers.activate(product(y_YD, self.gate), self._activation)
    y_YD = product(gate_YF * product(y_YD, self.up), self.down)
    y_YD = y_YD * weights_XC.reshape(-1)[order_Y][:, None]
    return jnp.zeros_like(x_XD).at[token_Y].add(y_YD)
