# SPDX-License-Identifier: Apache-2.0
"""Processes large arrays in pieces that fit the CPU cache.

Memory bandwidth limits the reading and writing of weights, so each piece is
copied, checked, hashed and written before the next one is loaded.
"""

from collections.abc import Callable, Iterator, Sequence
import math

import ml_dtypes
import numpy as np

from atlas_jax import errors

_PIECE = 2**18
_TILE_BYTES = 256  # One row of a tile.
_ALIGNMENT = 64  # XLA on a CPU uses arrays of this alignment in place.
_BFLOAT16, _FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
# Bits of +infinity. Without the sign, NaNs are larger, finite values smaller.
_INFINITIES = {
  _FLOAT32: 0x7F800000,
  np.dtype(np.float16): 0x7C00,
  _BFLOAT16: 0x7F80,
}


def empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
  """Returns an uninitialized array that a CPU device can use without a copy."""
  num_bytes = math.prod(shape) * dtype.itemsize
  memory = np.empty(num_bytes + _ALIGNMENT, np.uint8)
  start = -memory.ctypes.data % _ALIGNMENT
  return memory[start : start + num_bytes].view(dtype).reshape(shape)


def copy(
  source: np.ndarray, target: np.ndarray, look: Callable[[np.ndarray], None]
) -> None:
  """Copies an array into one of the same shape and casts it.

  It is fast for a source in C order and a target in C or Fortran order.

  Args:
    source: array to copy from.
    target: array to copy to.
    look: called with each piece of the source before it is copied, while the
      piece is in the cache.
  """
  if source.ndim != 2 or target.strides[0] != target.itemsize:
    step = max(1, _PIECE // max(1, math.prod(source.shape[1:])))
    source, target = np.atleast_1d(source), np.atleast_1d(target)
    for start in range(0, len(source), step):
      look(source[start : start + step])
      _cast(source[start : start + step], target[start : start + step])
    return
  size, source_bits = _tile(source.dtype), _bits(source)
  num_tiles = source.shape[1] // size
  whole = num_tiles * size
  tiles = np.empty((num_tiles, size, size), source_bits.dtype)
  turned = np.empty_like(tiles)
  for top in range(0, len(source), size):
    rows = slice(top, top + size)
    look(source[rows])
    goal, count = target[rows].T, len(source[rows])
    tiled = source_bits[rows, :whole].reshape(count, num_tiles, size)
    tiles[:, :count] = tiled.transpose(1, 0, 2)
    turned[:, :, :count] = tiles[:, :count].transpose(0, 2, 1)
    _cast(
      turned[:, :, :count].view(source.dtype),
      goal[:whole].reshape(num_tiles, size, count),
    )
    _cast(source[rows, whole:].T, goal[whole:])


def _tile(dtype: np.dtype) -> int:
  """Returns the side length of the tiles in which a matrix is transposed.

  NumPy transposes a whole matrix with strided, cache-missing access. Tiles that
  fit the L1 cache are copied in, transposed, and copied out 5 times faster.
  Unsigned integers are copied in bulk, bfloat16 element by element.
  """
  return _TILE_BYTES // dtype.itemsize


def _cast(source: np.ndarray, target: np.ndarray) -> None:
  """Copies and casts values; bfloat16 via its bits, as its loops are slow."""
  if source.dtype == target.dtype:
    _bits(target)[...] = _bits(source)
  elif (source.dtype, target.dtype) == (_BFLOAT16, _FLOAT32):
    np.left_shift(_bits(source), np.uint32(16), out=_bits(target))
  else:
    target[...] = source


def _bits(array: np.ndarray) -> np.ndarray:
  return array.view(f"u{array.dtype.itemsize}")


def pieces(array: np.ndarray, dtype: np.dtype) -> Iterator[np.ndarray]:
  """Yields an array in C order, piece by piece.

  Pieces may share memory: each is valid until the next one is requested.
  """
  with np.errstate(over="ignore"):  # Callers check for infinities.
    array = array.astype(dtype, copy=False)
  if array.ndim != 2 or array.flags.c_contiguous:
    flat = np.ascontiguousarray(array).reshape(-1)
    for start in range(0, flat.size, _PIECE):
      yield flat[start : start + _PIECE]
    return
  size, bits = _tile(array.dtype), _bits(array)
  num_tiles = bits.shape[1] // size
  whole = num_tiles * size
  tiles = np.empty((num_tiles, size, size), bits.dtype)
  turned = np.empty_like(tiles)
  rows = np.empty((size, bits.shape[1]), bits.dtype)
  for top in range(0, len(bits), size):
    columns = bits[top : top + size].T
    count = columns.shape[1]
    tiles[:, :, :count] = columns[:whole].reshape(num_tiles, size, count)
    turned[:, :count] = tiles[:, :, :count].transpose(0, 2, 1)
    target = rows[:count]
    tiled = target[:, :whole].reshape(count, num_tiles, size)
    tiled[:] = turned[:, :count].transpose(1, 0, 2)
    target[:, whole:] = columns[whole:].T
    yield target.view(dtype)


def is_finite(array: np.ndarray) -> bool:
  """Returns whether all values are finite, without a full-size mask."""
  if array.dtype not in _INFINITIES or not array.size:
    return bool(np.isfinite(array).all())
  # NumPy has no fast loop for bfloat16, so the bits are compared as integers:
  # the signed maximum is the largest positive value, and the unsigned maximum
  # is the negative value of the largest magnitude.
  infinity, size = _INFINITIES[array.dtype], array.dtype.itemsize
  sign = 1 << (8 * size - 1)
  return bool(
    array.view(f"i{size}").max() < infinity
    and array.view(f"u{size}").max() < infinity | sign
  )


def check_finite(name: str, array: np.ndarray) -> None:
  """Rejects a tensor, or part of one, that holds an infinity or a NaN.

  Raises:
    errors.CheckpointError: naming the tensor.
  """
  if not is_finite(array):
    count = int(array.size - np.isfinite(array).sum())
    raise errors.CheckpointError(
      "Weights are not finite.",
      where=name,
      why=f"At least {count} of its values are infinite or NaN.",
      fix="Use a checkpoint from before training diverged.",
    )
