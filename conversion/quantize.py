# SPDX-License-Identifier: Apache-2.0
"""Tensors of a Hugging Face directory become kernels kept in few bits.

Rows are rounded a few at a time, on the host's processor whatever the devices
are: the integers are the same on any mesh and any machine, and nothing larger
than a few rows is ever a float.
"""

import collections
from collections.abc import Mapping, Sequence
import concurrent.futures
import dataclasses
import functools
import math
from typing import Any, TypeAlias

import jax
import jax.sharding as js
import numpy as np

from atlas_jax import errors
from atlas_jax.models import quantized
from conversion import arrays, header, rules, shards

_Ranges: TypeAlias = tuple[range, ...]

_CHUNK = 2**20  # Weights that are rounded at once, by each reader.


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A kernel, in the files and as it is kept.

  Attributes:
    path: its own.
    parts: the pieces of the files that it is in, by layer, and expert.
    kept: its integers and scales, as `quantized.describe` tells them.
  """

  path: str
  parts: Mapping[tuple[int, ...], rules.Piece]
  kept: Mapping[str, jax.ShapeDtypeStruct]

  @property
  def kind(self) -> quantized.Kind:
    """To what it is rounded, and the name of its integers."""
    return next(kind for kind in quantized.KINDS if kind in self.kept)

  @property
  def scales(self) -> str:
    """The name of its scales."""
    return next(name for name in self.kept if name != self.kind)

  @property
  def num_stacked(self) -> int:
    """How many axes are those of layers and experts."""
    return self._piece.rule.num_stacked

  @property
  def num_in(self) -> int:
    """How many axes of inputs come after them; the others are of outputs."""
    return self._piece.rule.num_in or 0

  @property
  def shape(self) -> tuple[int, ...]:
    """Its own, not that of its integers."""
    stacked = self.kept[self.kind].shape[: self.num_stacked]
    return (*stacked, *self._piece.shape)

  @property
  def _piece(self) -> rules.Piece:
    return next(iter(self.parts.values()))


def assemble(
  kernel: Kernel,
  places: Mapping[str, js.Sharding],
  tensors: Mapping[str, header.Tensor],
  pool: concurrent.futures.Executor,
) -> dict[str, jax.Array]:
  """Reads and rounds what this process's devices own of a kernel.

  Devices that own different inputs of the same outputs share the work: a scale
  of int8 is that of all inputs.

  Args:
    kernel: see there.
    places: where its integers and its scales go.
    tensors: those of the files, by name.
    pool: reads layers side by side.

  Returns:
    Integers and scales, on their devices.

  Raises:
    errors.CheckpointError: if a weight is not finite.
    errors.ConfigError: if JAX may not use the host's processor.
  """
  indices = {
    name: places[name].addressable_devices_indices_map(leaf.shape)
    for name, leaf in kernel.kept.items()
  }
  owners = collections.defaultdict(list)
  for device, index in indices[kernel.kind].items():
    part = _part(index, kernel.kept[kernel.kind].shape, kernel.shape)
    inputs_end = kernel.num_stacked + kernel.num_in
    others = part[: kernel.num_stacked] + part[inputs_end:]
    owners[others].append((device, part))
  owned: dict[str, list[jax.Array]] = {name: [] for name in kernel.kept}
  for members in owners.values():
    hull = _hull([part for _, part in members])
    blocks = _read(kernel, hull, tensors, pool)
    for device, _ in members:
      for name, leaf in kernel.kept.items():
        mine = _part(indices[name][device], leaf.shape, kernel.shape)
        block = blocks[name][_within(mine, hull, leaf.shape, kernel.shape)]
        owned[name].append(jax.device_put(block, device))
  return {
    name: jax.make_array_from_single_device_arrays(
      leaf.shape, places[name], owned[name]
    )
    for name, leaf in kernel.kept.items()
  }


def _read(
  kernel: Kernel,
  hull: _Ranges,
  tensors: Mapping[str, header.Tensor],
  pool: concurrent.futures.Executor,
) -> dict[str, np.ndarray]:
  """Reads and rounds a part of a kernel."""
  blocks = {}
  for name, leaf in kernel.kept.items():
    slices = _within(hull, hull, leaf.shape, kernel.shape)
    sizes = [each.stop - each.start for each in slices]
    blocks[name] = arrays.empty(sizes, leaf.dtype)
  values, scales = blocks[kernel.kind], blocks[kernel.scales]
  start, stop = kernel.num_stacked, kernel.num_stacked + kernel.num_in
  inputs, outputs = hull[start:stop], hull[stop:]
  block, seen, kept = 0, inputs, slice(None)
  if kernel.kind == "nf4":
    block = quantized.block_size(kernel.path, kernel.shape[stop - 1])
  else:  # A scale is that of all inputs, whichever are asked for.
    seen = tuple(map(range, kernel.shape[start:stop]))
    numbers = np.arange(math.prod(map(len, seen))).reshape([*map(len, seen)])
    kept = numbers[_slices(inputs)].ravel()
  host = _host(kernel.kind)

  def fill(place: tuple[int, ...]) -> None:
    stacked = zip(hull, place, strict=False)
    piece = kernel.parts[tuple(each[i] for each, i in stacked)]
    rows = shards.read(tensors[piece.name])[piece.start : piece.stop]
    layer = rules.from_hf(piece.rule, rows, piece.shape)
    rows_XI = rules.to_hf(piece.rule, layer[_slices((*seen, *outputs))])
    values_XI = rules.to_hf(piece.rule, values[place])
    scales_XI = rules.to_hf(piece.rule, scales[place])
    check = functools.partial(arrays.check_finite, piece.name)
    step = max(1, _CHUNK // rows_XI.shape[1])
    for first in range(0, len(rows_XI), step):
      chunk = slice(first, first + step)
      floats_XI = np.empty(rows_XI[chunk].shape, np.float32)
      arrays.copy(rows_XI[chunk], floats_XI, check)
      rounded = _quantize(jax.device_put(floats_XI, host), kernel.kind, block)
      values_XI[chunk] = np.asarray(rounded[0])[:, kept]
      scales_XI[chunk] = rounded[1]

  for _ in pool.map(fill, np.ndindex(*map(len, hull[:start]))):
    pass
  return blocks


def _host(kind: quantized.Kind) -> Any:  # Any: JAX names no type for it.
  """Gives the host's processor.

  Raises:
    errors.ConfigError: if JAX may not use it.
  """
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError as error:
    raise errors.ConfigError(
      f"Kernels cannot be rounded to {kind}.",
      where="JAX_PLATFORMS in the environment",
      why="They are rounded on the host's processor, which it leaves out.",
      fix="Unset it, or end it with ,cpu.",
    ) from error


_quantize = jax.jit(quantized.quantize, static_argnames=("kind", "block"))


def _part(
  index: Any,  # Any: a tuple of slices, or None for all.
  shape: Sequence[int],
  kernel: Sequence[int],
) -> _Ranges:
  """Tells which part of the kernel some integers or scales are of."""
  index = index or (slice(None),) * len(shape)
  ranges = []
  for part, size, whole in zip(index, shape, kernel, strict=True):
    start, stop, _ = part.indices(size)
    ranges.append(range(start * whole // size, stop * whole // size))
  return tuple(ranges)


def _hull(parts: Sequence[_Ranges]) -> _Ranges:
  """Gives the smallest part of a kernel that has all of some parts."""
  return tuple(
    range(min(r.start for r in each), max(r.stop for r in each))
    for each in zip(*parts, strict=True)
  )


def _within(
  part: _Ranges, hull: _Ranges, shape: Sequence[int], kernel: Sequence[int]
) -> tuple[slice, ...]:
  """Says where a part of the kernel is in integers or scales of the hull."""
  return tuple(
    # A scale of all inputs is there whatever part of them is asked for.
    slice(0, 1)
    if size == 1
    else slice(
      (mine.start - all_.start) * size // whole,
      (mine.stop - all_.start) * size // whole,
    )
    for mine, all_, size, whole in zip(part, hull, shape, kernel, strict=True)
  )


def _slices(ranges: Sequence[range]) -> tuple[slice, ...]:
  return tuple(slice(each.start, each.stop) for each in ranges)
