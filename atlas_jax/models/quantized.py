# SPDX-License-Identifier: Apache-2.0
"""Frozen kernels stored as small integers with scales.

A quantized kernel is a dict instead of an array: `int8` with `channel_scales`,
one per output; or `nf4` with `block_scales`, one per block of inputs of each
output. The axes of the kernel are kept, so that sharding rules can name them.
All other parameters stay arrays. The decoder dequantizes the kernels of a layer
when it computes that layer.

Source of nf4: Dettmers et al., arXiv:2305.14314, section 3, without its double
quantization.
"""

from collections.abc import Iterator, Mapping
import functools
import math
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
import qwix

from atlas_jax import errors

Kind = Literal["int8", "nf4"]
KINDS: tuple[Kind, ...] = ("int8", "nf4")
# Names and dtypes of the scales. The scale of an nf4 block is its largest
# absolute weight, which bfloat16 holds exactly for a bfloat16 kernel.
_SCALES = {
  "int8": ("channel_scales", jnp.float32),
  "nf4": ("block_scales", jnp.bfloat16),
}
# Path, number of stacked axes, number of input axes after them. Parameters that
# match no path (embedding, head, norms, router) are stored in bfloat16.
_KERNELS = (
  (r"layers/attention/[qkv]/kernel", 1, 1),
  (r"layers/attention/o/kernel", 1, 2),
  (r"layers/mlp/(gate|up|down)/kernel", 1, 1),
  (r"layers/mixture/(gate|up|down)", 2, 1),
)
_BLOCK = 64
_MIN_BLOCK = 16


def kind_of(params: Mapping[str, Any]) -> Kind | None:
  """Returns how the kernels of a tree are quantized; None if none is."""
  return next((kind for kind, _ in _found(params)), None)


def describe(params: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
  """Returns the shapes and dtypes of quantized parameters.

  Args:
    params: nested dicts; leaves have a `shape`.
    kind: quantization of the kernels.

  Returns:
    The same tree with `jax.ShapeDtypeStruct` as leaves, and a dict for each
    kernel. For a kernel [layers, inputs, outputs]:

      int8  [layers, inputs, outputs]      channel_scales [layers, 1, outputs]
      nf4   [layers, inputs / 2, outputs]  block_scales
                                           [layers, inputs / block, outputs]

  Raises:
    errors.ConfigError: if the inputs of a kernel do not divide into blocks.
  """

  def of(path: tuple[Any, ...], leaf: Any) -> Any:
    name = "/".join(str(key.key) for key in path)
    if (axis := last_input(name)) is None:
      return jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16)
    num_stacked = next(n for p, n, _ in _KERNELS if re.fullmatch(p, name))
    scales_name, dtype = _SCALES[kind]
    values, scales = list(leaf.shape), list(leaf.shape)
    if kind == "int8":
      scales[num_stacked : axis + 1] = [1] * (axis + 1 - num_stacked)
    else:
      values[axis] //= 2
      scales[axis] //= block_size(name, leaf.shape[axis])
    integer = jnp.int8 if kind == "int8" else jnp.uint8
    return {
      kind: jax.ShapeDtypeStruct(tuple(values), integer),
      scales_name: jax.ShapeDtypeStruct(tuple(scales), dtype),
    }

  return jax.tree_util.tree_map_with_path(of, params)


def last_input(path: str) -> int | None:
  """Returns the last input axis of a kernel; None if `path` is no kernel."""
  for pattern, num_stacked, num_in in _KERNELS:
    if re.fullmatch(pattern, path):
      return num_stacked + num_in - 1
  return None


def block_size(path: str, size: int) -> int:
  """Returns the number of inputs that share a scale: gcd(size, 64).

  Raises:
    errors.ConfigError: if it is below 16.
  """
  block = math.gcd(size, _BLOCK)
  if block < _MIN_BLOCK:
    raise errors.ConfigError(
      f"Parameter {path} cannot be stored as nf4: it has {size} inputs.",
      where="param_dtype=nf4",
      why=f"Their number divides into blocks of at most {block}; below "
      f"{_MIN_BLOCK}, the scales take up the memory that nf4 saves.",
      fix="Set this model's param_dtype to int8 or bfloat16.",
    )
  return block


def quantize(
  kernel_XI: jax.Array, kind: Kind, block: int
) -> tuple[jax.Array, jax.Array]:
  """Quantizes a kernel with one row per output.

  Args:
    kernel_XI: float32, outputs by inputs.
    kind: the quantization.
    block: number of inputs that share a scale; nf4 only.

  Returns:
    Integers and scales, outputs first. Two nf4 codes share a byte: input i of a
    block is in the low bits of byte i, input i + block / 2 in its high bits.
  """
  _, scale_dtype = _SCALES[kind]
  if kind == "int8":
    rounded = qwix.quantize(kernel_XI, jnp.int8, channelwise_axes=(0,))
    return rounded.qvalue, rounded.scale
  rounded = qwix.quantize(
    kernel_XI,
    "nf4",
    channelwise_axes=(0,),
    tiled_axes={1: block},
    scale_dtype=scale_dtype,
  )
  codes = rounded.qvalue.astype(jnp.uint8)
  codes = codes.reshape(len(codes), -1, 2, block // 2)
  packed = codes[:, :, 0] | (codes[:, :, 1] << 4)
  return packed.reshape(len(codes), -1), rounded.scale


def restore(params: Mapping[str, Any], dtype: jnp.dtype) -> dict[str, Any]:
  """Returns parameters with quantized kernels dequantized to `dtype`.

  A value is integer times scale in float32, rounded to `dtype`. Parameters that
  are not quantized are returned as they are, without a copy.
  """

  def of(node: Any) -> Any:
    if not isinstance(node, Mapping):
      return node
    for kind in KINDS:
      if kind in node:
        return _dequantize(node, kind).astype(dtype)
    return {name: of(child) for name, child in node.items()}

  return of(params)


def whole(params: Mapping[str, Any], dtype: jnp.dtype) -> Mapping[str, Any]:
  """Returns all parameters as arrays of `dtype` if any kernel is quantized.

  Kernels keep the sharding of their integers. A tree without quantized kernels
  is returned unchanged.
  """
  if kind_of(params) is None:
    return params
  return jax.device_put(_whole(params, dtype), places(params))


# Jitted as a whole: op by op, each kernel would be materialized in float32.
@functools.partial(jax.jit, static_argnames="dtype")
def _whole(params: Mapping[str, Any], dtype: jnp.dtype) -> Mapping[str, Any]:
  restored = restore(params, dtype)
  return jax.tree.map(lambda leaf: leaf.astype(dtype), restored)


def places(params: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns the sharding of each parameter; kernels have their integers'."""

  def of(node: Any) -> Any:
    if not isinstance(node, Mapping):
      return node.sharding
    for kind in KINDS:
      if kind in node:
        return node[kind].sharding
    return {name: of(child) for name, child in node.items()}

  return of(params)


def _dequantize(kept: Mapping[str, jax.Array], kind: Kind) -> jax.Array:
  """Dequantizes a kernel to float32."""
  values, scales = kept[kind], kept[_SCALES[kind][0]].astype(jnp.float32)
  if kind == "int8":
    return qwix.dequantize(qwix.QArray(values, scales))
  (axis,) = (
    i
    for i, sizes in enumerate(zip(values.shape, scales.shape, strict=True))
    if sizes[0] != sizes[1]
  )
  before, after = values.shape[:axis], values.shape[axis + 1 :]
  num_blocks = scales.shape[axis]
  packed = values.reshape(*before, num_blocks, 1, -1, *after)
  half = jnp.arange(2, dtype=jnp.uint8).reshape(2, 1, *(1,) * len(after))
  codes = (packed >> (4 * half)) & jnp.uint8(15)
  # Not with qwix.dequantize, which flattens the kernel first and so gathers one
  # that is sharded.
  restored = jnp.take(_levels(), codes, mode="clip") * scales.reshape(
    *before, num_blocks, 1, 1, *after
  )
  return restored.reshape(*before, -1, *after)


def _levels() -> jax.Array:
  """Returns the 16 levels of nf4, within [-1, 1]."""
  every = qwix.QArray(
    jnp.arange(16).astype(jnp.uint4), jnp.ones(16), qtype="nf4"
  )
  return qwix.dequantize(every)


def _found(
  params: Mapping[str, Any],
) -> Iterator[tuple[Kind, Mapping[str, Any]]]:
  """Yields the quantized kernels."""
  for name, node in params.items():
    if name in KINDS:
      yield name, params
    elif isinstance(node, Mapping):
      yield from _found(node)
