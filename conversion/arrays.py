# SPDX-License-Identifier: Apache-2.0
"""Large arrays, worked on in pieces that stay in the cache.

Memory is slower than anything that is done to weights on their way to a file,
so it is read once: what is laid out in one piece is checked, hashed and
written before the next.
"""

from collections.abc import Callable, Iterator, Sequence
import math

import ml_dtypes
import numpy as np

from atlas_jax import errors

_PIECE = 2**18
_TILE_BYTES = 256  # Of a row.
_ALIGNMENT = 64  # XLA on a CPU takes what is aligned so as it is.
_BFLOAT16, _FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
# The bits of infinity; those of a NaN are more, those of numbers are less.
_INFINITIES = {
  _FLOAT32: 0x7F800000,
  np.dtype(np.float16): 0x7C00,
  _BFLOAT16: 0x7F80,
}


def empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
  """Makes an array, not filled, which a CPU device takes without a copy."""
  num_bytes = math.prod(shape) * dtype.itemsize
  memory = np.empty(num_bytes + _ALIGNMENT, np.uint8)
  start = -memory.ctypes.data % _ALIGNMENT
  return memory[start : start + num_bytes].view(dtype).reshape(shape)


def copy(
  source: np.ndarray, target: np.ndarray, look: Callable[[np.ndarray], None]
) -> None:
  """Copies an array into one of the same shape, and casts it.

  It is fast for a source in C order, into a target in either order.

  Args:
    source: where from.
    target: where to.
    look: sees each piece of the source before it is copied, so that memory is
      read once.
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
  """Tells how many rows and columns of a matrix are turned at a time.

  NumPy walks a whole transpose against the cache. Tiles that fit the fastest
  cache, which are copied as they lie, turned, and copied out, are 5 times
  faster. Unsigned integers are copied in bulk, bfloat16 element by element.
  """
  return _TILE_BYTES // dtype.itemsize


def _cast(source: np.ndarray, target: np.ndarray) -> None:
  """Copies values; bfloat16 by its bits, since its own loops are slow."""
  if source.dtype == target.dtype:
    _bits(target)[...] = _bits(source)
  elif (source.dtype, target.dtype) == (_BFLOAT16, _FLOAT32):
    np.left_shift(_bits(source), np.uint32(16), out=_bits(target))
  else:
    target[...] = source


def _bits(array: np.ndarray) -> np.ndarray:
  return array.view(f"u{array.dtype.itemsize}")


def pieces(array: np.ndarray, dtype: np.dtype) -> Iterator[np.ndarray]:
  """Lays an array out in C order, piece by piece.

  Pieces may share their memory: one is good until the next is asked for.
  """
  with np.errstate(over="ignore"):  # An infinity is for the caller to find.
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
  """Tells if no value is infinite or NaN, without a mask of the whole."""
  if array.dtype not in _INFINITIES or not array.size:
    return bool(np.isfinite(array).all())
  # NumPy has no fast loop for bfloat16. Read as integers, with and without a
  # sign, the greatest positive and the greatest negative number are maxima.
  infinity, size = _INFINITIES[array.dtype], array.dtype.itemsize
  sign = 1 << (8 * size - 1)
  return bool(
    array.view(f"i{size}").max() < infinity
    and array.view(f"u{size}").max() < infinity | sign
  )


def check_finite(name: str, array: np.ndarray) -> None:
  """Refuses a tensor, or part of one, that holds an infinity or a NaN.

  Raises:
    errors.CheckpointError: naming the tensor.
  """
  if not is_finite(array):
    count = int(array.size - np.isfinite(array).sum())
    raise errors.CheckpointError(
      "A weight is not finite.",
      where=name,
      why=f"At least {count} of its values are infinite or NaN.",
      fix="Go back to a checkpoint from before training diverged.",
    )
