# SPDX-License-Identifier: Apache-2.0
"""Layers of the decoder, except attention.

`dtype` is the dtype of activations. Parameters keep their own; kernels are cast
where they are used.
"""

from collections.abc import Sequence
import math

from flax import nnx
import jax
import jax.numpy as jnp

from atlas_jax.models import decoder_config


class Linear(nnx.Module):
  """Linear map over trailing axes, with an optional bias and LoRA adapter.

  The kernel keeps its axes separate, such as [D, N, H], so that sharding rules
  can name them. Leading axes of the input are flattened: one product over
  [tokens, D] is faster than a batched one, mostly in the backward pass.

  With an adapter, computes x W + scale (x A) B + bias, arXiv:2106.09685; the
  product A B, as large as the kernel, is never formed.
  """

  def __init__(
    self,
    shape_in: Sequence[int],
    shape_out: Sequence[int],
    *,
    use_bias: bool,
    scale: float,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
  ) -> None:
    """Draws the kernel from a normal distribution with deviation `scale`."""
    shape = (*shape_in, *shape_out)
    self.kernel = nnx.Param(scale * jax.random.normal(rngs.params(), shape))
    self.bias = nnx.Param(jnp.zeros(shape_out)) if use_bias else None
    self.lora_a, self.lora_b = nnx.data(None), nnx.data(None)
    self._num_in = len(shape_in)
    self._lora_scale = 0.0
    self._dtype = dtype

  def add_adapter(self, *, rank: int, scale: float) -> None:
    """Adds A and B as zeros; `lora.init` draws their initial values."""
    shape = self.kernel.shape
    shape_in, shape_out = shape[: self._num_in], shape[self._num_in :]
    self.lora_a = nnx.Param(jnp.zeros((*shape_in, rank)))
    self.lora_b = nnx.Param(jnp.zeros((rank, *shape_out)))
    self._lora_scale = scale

  def __call__(self, x: jax.Array) -> jax.Array:
    """Contracts the last axes of `x` with the first axes of the kernel."""
    kernel = self.kernel[...].astype(self._dtype)
    shape_in = kernel.shape[: self._num_in]
    shape_out = kernel.shape[self._num_in :]
    leading = x.shape[: x.ndim - self._num_in]
    size_in = math.prod(shape_in)
    x = x.reshape(-1, size_in)
    y = x @ kernel.reshape(size_in, -1)
    if self.lora_a is not None and self.lora_b is not None:
      a = self.lora_a[...].astype(self._dtype)
      b = self.lora_b[...].astype(self._dtype)
      low = self._lora_scale * (x @ a.reshape(size_in, -1))
      y = y + low @ b.reshape(len(b), -1)
    y = y.reshape(*leading, *shape_out)
    if self.bias is None:
      return y
    return y + self.bias[...].astype(self._dtype)


def rms_norm(
  x: jax.Array,
  scale: jax.Array,
  *,
  epsilon: float,
  zero_centered: bool,
  dtype: jnp.dtype,
) -> jax.Array:
  """Normalises the last axis by its root mean square, in float32.

  A `zero_centered` scale is stored minus one, and applied before rounding to
  `dtype`, as in Gemma.

  Source: Zhang and Sennrich, arXiv:1910.07467.
  """
  x32 = x.astype(jnp.float32)
  mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
  normed = x32 * jax.lax.rsqrt(mean_square + epsilon)
  if zero_centered:
    return (normed * (1.0 + scale.astype(jnp.float32))).astype(dtype)
  return normed.astype(dtype) * scale.astype(dtype)


class RMSNorm(nnx.Module):
  """`rms_norm` with a trained scale."""

  def __init__(
    self, size: int, *, epsilon: float, zero_centered: bool, dtype: jnp.dtype
  ) -> None:
    """Initializes the scale to one."""
    start = jnp.zeros if zero_centered else jnp.ones
    self.scale = nnx.Param(start((size,)))
    self._epsilon, self._zero_centered = epsilon, zero_centered
    self._dtype = dtype

  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises the last axis."""
    return rms_norm(
      x,
      self.scale[...],
      epsilon=self._epsilon,
      zero_centered=self._zero_centered,
      dtype=self._dtype,
    )


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
  """Computes cap tanh(x / cap), within (-cap, cap); returns x without a cap.

  Source: Gemma 2, arXiv:2408.00118, section 2.
  """
  return x if cap is None else cap * jnp.tanh(x / cap)


def activate(x: jax.Array, activation: decoder_config.Activation) -> jax.Array:
  """Applies silu, or gelu in its tanh approximation."""
  if activation == "silu":
    return jax.nn.silu(x)
  return jax.nn.gelu(x, approximate=True)


class GatedMLP(nnx.Module):
  """down(activation(gate(x)) * up(x)).

  Source: Shazeer, arXiv:2002.05202.
  """

  def __init__(
    self,
    width: int,
    mlp_width: int,
    *,
    activation: decoder_config.Activation,
    scale: float,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
  ) -> None:
    """Draws the three kernels."""
    kwargs = {"use_bias": False, "scale": scale, "dtype": dtype, "rngs": rngs}
    self.gate = Linear((width,), (mlp_width,), **kwargs)
    self.up = Linear((width,), (mlp_width,), **kwargs)
    self.down = Linear((mlp_width,), (width,), **kwargs)
    self._activation: decoder_config.Activation = activation

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    """Applies the MLP at every position."""
    gate = activate(self.gate(x_BTD), self._activation)
    return self.down(gate * self.up(x_BTD))
