# SPDX-License-Identifier: Apache-2.0
"""Reads tensors of a Hugging Face directory as quantized kernels.

Rows are quantized in chunks on the host's CPU, whatever the devices are: the
integers are the same on any mesh and machine, and only one chunk of rows per
reader is ever in floating point.
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

_CHUNK = 2**20  # Weights that each reader quantizes at once.


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A kernel in the files, and its quantized form.

  Attributes:
    path: of the parameter.
    parts: its pieces in the files, by layer and expert.
    kept: shapes of its integers and scales; see `quantized.describe`.
  """

  path: str
  parts: Mapping[tuple[int, ...], rules.Piece]
  kept: Mapping[str, jax.ShapeDtypeStruct]

  @property
  def kind(self) -> quantized.Kind:
    """The quantization, which is also the name of the integers."""
    return next(kind for kind in quantized.KINDS if kind in self.kept)

  @property
  def scales(self) -> str:
    """The name of the scales."""
    return next(name for name in self.kept if name != self.kind)

  @property
  def num_stacked(self) -> int:
    """Number of leading axes: layers and experts."""
    return self._piece.rule.num_stacked

  @property
  def num_in(self) -> int:
    """Number of input axes after the stacked ones; outputs follow."""
    return self._piece.rule.num_in or 0

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the kernel, not of its integers."""
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
  """Reads and quantizes the parts of a kernel that this process's devices own.

  Devices that own different inputs of the same outputs share one read, since a
  scale of int8 covers all inputs.

  Args:
    kernel: see `Kernel`.
    places: shardings of its integers and scales.
    tensors: of the files, by name.
    pool: reads layers in parallel.

  Returns:
    Integers and scales, on their devices.

  Raises:
    errors.CheckpointError: if a weight is not finite.
    errors.ConfigError: if JAX has no CPU backend.
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
  """Reads and quantizes the part `hull` of a kernel."""
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
  else:  # A scale covers all inputs, so all are read.
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
  """Returns the host's CPU device.

  Raises:
    errors.ConfigError: if JAX has no CPU backend.
  """
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError as error:
    raise errors.ConfigError(
      f"Kernels cannot be quantized to {kind}: JAX has no CPU backend.",
      where="JAX_PLATFORMS in the environment",
      why="Kernels are quantized on the CPU, which it excludes.",
      fix="Unset it, or append ,cpu.",
    ) from error


_quantize = jax.jit(quantized.quantize, static_argnames=("kind", "block"))


def _part(
  index: Any,  # Any: a tuple of slices, or None for all.
  shape: Sequence[int],
  kernel: Sequence[int],
) -> _Ranges:
  """Returns the part of the kernel that an index of integers or scales covers.

  Two nf4 integers share a byte and a scale covers a block, so an axis of the
  array may be shorter than that of the kernel:

    array of `size`:   | 0 | 1 | 2 | 3 |     index 1:3
    kernel of `whole`: |0 1|2 3|4 5|6 7|     range(2, 6)
  """
  index = index or (slice(None),) * len(shape)
  ranges = []
  for part, size, whole in zip(index, shape, kernel, strict=True):
    start, stop, _ = part.indices(size)
    ranges.append(range(start * whole // size, stop * whole // size))
  return tuple(ranges)


def _hull(parts: Sequence[_Ranges]) -> _Ranges:
  """Returns the smallest part of a kernel that contains all `parts`."""
  return tuple(
    range(min(r.start for r in each), max(r.stop for r in each))
    for each in zip(*parts, strict=True)
  )


def _within(
  part: _Ranges, hull: _Ranges, shape: Sequence[int], kernel: Sequence[int]
) -> tuple[slice, ...]:
  """Returns the slices of `part` in integers or scales of the part `hull`."""
  return tuple(
    # A scale of all inputs belongs to every part of them.
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
