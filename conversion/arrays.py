# SPDX-License-Identifier: Apache-2.0
"""Large arrays, worked on in pieces that stay in the cache.

Memory is slower than anything that is done to weights on their way to a file,
so it is read once: what is laid out in one piece is checked, hashed and
written before the next.
"""

from collections.abc import Iterator

import ml_dtypes
import numpy as np

_PIECE = 2**18
_TILE_ROWS, _TILE_COLUMNS = 256, 64
# What is set in every infinity and NaN, and in no finite number.
_EXPONENTS = {
  np.dtype(np.float32): np.uint32(0x7F800000),
  np.dtype(np.float16): np.uint16(0x7C00),
  np.dtype(ml_dtypes.bfloat16): np.uint16(0x7F80),
}


def pieces(array: np.ndarray, dtype: np.dtype) -> Iterator[np.ndarray]:
  """Lays an array out in C order, piece by piece.

  Pieces may share their memory: one is good until the next is asked for.
  """
  array = array.astype(dtype, copy=False)
  if array.ndim != 2 or array.flags.c_contiguous:
    flat = np.ascontiguousarray(array).reshape(-1)
    for start in range(0, flat.size, _PIECE):
      yield flat[start : start + _PIECE]
    return
  # NumPy walks a whole transpose against the cache: tiles, copied once as they
  # lie and once turned, are 5 times faster. Unsigned integers are copied in
  # bulk, bfloat16 element by element.
  bits = array.view(f"u{dtype.itemsize}")
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
  if array.dtype not in _EXPONENTS or not array.flags.c_contiguous:
    return bool(np.isfinite(array).all())
  # NumPy has no loop of its own for bfloat16; on integers it is 6 times faster.
  exponent = _EXPONENTS[array.dtype]
  bits = array.reshape(-1).view(exponent.dtype)
  return not any(
    ((bits[start : start + _PIECE] & exponent) == exponent).any()
    for start in range(0, bits.size, _PIECE)
  )
