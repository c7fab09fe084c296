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
_TILE_ROWS, _TILE_COLUMNS = 256, 64
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
  if source.ndim != 2 or not target.T.flags.c_contiguous:
    step = max(1, _PIECE // max(1, math.prod(source.shape[1:])))
    source, target = np.atleast_1d(source), np.atleast_1d(target)
    for start in range(0, len(source), step):
      look(source[start : start + step])
      _cast(source[start : start + step], target[start : start + step])
    return
  # NumPy walks a whole transpose against the cache: tiles, copied once as they
  # lie and once turned, are 5 times faster.
  num_tiles = source.shape[1] // _TILE_COLUMNS
  whole = num_tiles * _TILE_COLUMNS
  memory = np.empty((num_tiles, _TILE_ROWS, _TILE_COLUMNS), target.dtype)
  for top in range(0, len(source), _TILE_ROWS):
    piece, turned = (
      source[top : top + _TILE_ROWS],
      target[top : top + _TILE_ROWS].T,
    )
    look(piece)
    tiles = memory[:, : len(piece)]
    rows = piece[:, :whole].reshape(len(piece), num_tiles, _TILE_COLUMNS)
    _cast(rows.transpose(1, 0, 2), tiles)
    columns = turned[:whole].reshape(num_tiles, _TILE_COLUMNS, len(piece))
    _bits(columns)[:] = _bits(tiles).transpose(0, 2, 1)
    _cast(piece[:, whole:], turned[whole:].T)


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
  # NumPy walks a whole transpose against the cache: tiles, copied once as they
  # lie and once turned, are 5 times faster. Unsigned integers are copied in
  # bulk, bfloat16 element by element.
  bits = _bits(array)
  rows = np.empty((_TILE_ROWS, bits.shape[1]), bits.dtype)
  tile = np.empty((_TILE_COLUMNS, _TILE_ROWS), bits.dtype)
  for top in range(0, bits.shape[0], _TILE_ROWS):
    source = bits[top : top + _TILE_ROWS].T
    target = rows[: source.shape[1]]
    for left in range(0, source.shape[0], _TILE_COLUMNS):
      part = source[left : left + _TILE_COLUMNS]
      turned = tile[: part.shape[0], : part.shape[1]]
      turned[:] = part
      target[:, left : left + _TILE_COLUMNS] = turned.T
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
