# SPDX-License-Identifier: Apache-2.0
"""Kernels kept as small integers with scales, for a base that is not trained.

In the place of such a kernel's array there is a dict: `int8` with
`channel_scales`, one for each output; or `nf4` with `block_scales`, one for
each block of inputs of an output. Every axis of the kernel is kept, so that
sharding rules can name it; what else there is stays an array. A decoder
restores the kernels of a layer where it computes this layer.

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
# Names of the scales beside those of the integers, and their precision. The
# largest weight of a block of bfloat16 is its scale, bit for bit.
_SCALES = {
  "int8": ("channel_scales", jnp.float32),
  "nf4": ("block_scales", jnp.bfloat16),
}
# By path: how many axes are stacked, and how many of inputs come after. What is
# not here, such as embedding, head, norms and router, is kept in bfloat16.
_KERNELS = (
  (r"layers/attention/[qkv]/kernel", 1, 1),
  (r"layers/attention/o/kernel", 1, 2),
  (r"layers/mlp/(gate|up|down)/kernel", 1, 1),
  (r"layers/mixture/(gate|up|down)", 2, 1),
)
_BLOCK = 64
_MIN_BLOCK = 16


def kind_of(params: Mapping[str, Any]) -> Kind | None:
  """Tells how kernels of a tree are kept; None where all are floats."""
  return next((kind for kind, _ in _found(params)), None)


def describe(params: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
  """Tells shapes and precisions of parameters that are kept so.

  Args:
    params: nested dicts with anything that has a `shape` as leaves.
    kind: of their kernels.

  Returns:
    The same with `jax.ShapeDtypeStruct` as leaves, a dict for each kernel.

  Raises:
    errors.ConfigError: if a kernel has no blocks worth a scale.
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
  """Tells which axis of a kernel has its blocks; None for what is no kernel."""
  for pattern, num_stacked, num_in in _KERNELS:
    if re.fullmatch(pattern, path):
      return num_stacked + num_in - 1
  return None


def block_size(path: str, size: int) -> int:
  """Tells how many inputs share a scale: 64, or the part of it that divides.

  Raises:
    errors.ConfigError: if that is less than is worth a scale.
  """
  block = math.gcd(size, _BLOCK)
  if block < _MIN_BLOCK:
    raise errors.ConfigError(
      f"Parameter {path} has no blocks for nf4.",
      where="param_dtype=nf4",
      why=f"Its inputs are {size}, which divides by blocks of {block} at most; "
      f"scales of blocks below {_MIN_BLOCK} would take what is saved.",
      fix="Set this model's param_dtype to int8, or bfloat16.",
    )
  return block


def quantize(
  kernel_XI: jax.Array, kind: Kind, block: int
) -> tuple[jax.Array, jax.Array]:
  """Rounds rows of a kernel, one row for each output.

  Args:
    kernel_XI: float32, outputs by inputs.
    kind: to what.
    block: of nf4: how many inputs share a scale.

  Returns:
    The integers and the scales as they are kept, outputs first. Two inputs of
    nf4 share a byte: of each block the first half is in the low bits.
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
  """Puts arrays of `dtype` in the place of kernels that are kept otherwise.

  A value is its integer's times its scale, in float32, then rounded. All else
  stays as it is, and is not copied.
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
  """Gives all parameters as arrays of one precision, where some are not.

  They lie where their integers do. What has no such kernel is given as it is.
  """
  if kind_of(params) is None:
    return params
  return jax.device_put(_whole(params, dtype), places(params))


# One program: step by step, a float32 of each kernel would be made first.
@functools.partial(jax.jit, static_argnames="dtype")
def _whole(params: Mapping[str, Any], dtype: jnp.dtype) -> Mapping[str, Any]:
  restored = restore(params, dtype)
  return jax.tree.map(lambda leaf: leaf.astype(dtype), restored)


def places(params: Mapping[str, Any]) -> Mapping[str, Any]:
  """Tells where each parameter lies: a kernel is split as its integers are."""

  def of(node: Any) -> Any:
    if not isinstance(node, Mapping):
      return node.sharding
    for kind in KINDS:
      if kind in node:
        return node[kind].sharding
    return {name: of(child) for name, child in node.items()}

  return of(params)


def _dequantize(kept: Mapping[str, jax.Array], kind: Kind) -> jax.Array:
  """Computes a kernel in float32."""
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
  # Looked up here and not by qwix, which lays all out in a row first: a kernel
  # that is split over devices would be gathered for that.
  restored = jnp.take(_levels(), codes, mode="clip") * scales.reshape(
    *before, num_blocks, 1, 1, *after
  )
  return restored.reshape(*before, -1, *after)


def _levels() -> jax.Array:
  """Gives the 16 numbers that nf4 has for weights within [-1, 1]."""
  every = qwix.QArray(
    jnp.arange(16).astype(jnp.uint4), jnp.ones(16), qtype="nf4"
  )
  return qwix.dequantize(every)


def _found(
  params: Mapping[str, Any],
) -> Iterator[tuple[Kind, Mapping[str, Any]]]:
  """Lists the kernels that are kept as integers."""
  for name, node in params.items():
    if name in KINDS:
      yield name, params
    elif isinstance(node, Mapping):
      yield from _found(node)
