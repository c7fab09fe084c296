# SPDX-License-Identifier: Apache-2.0
"""Pieces equal the array in C order, for any memory layout and size."""

import ml_dtypes
import numpy as np
import pytest

from conversion import arrays

_LAYOUTS = {
  "in order": lambda a: a,
  "transposed": lambda a: np.asfortranarray(a),
  "every other column": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
  "backwards": lambda a: a[::-1, ::-1],
}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("layout", _LAYOUTS.values(), ids=_LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 700), (257, 65), (512, 1100)])
def test_pieces_concatenate_to_the_array_in_c_order(shape, layout, dtype):
  values = np.arange(shape[0] * shape[1], dtype=np.float32).reshape(shape)
  array = layout(values.astype(dtype))
  found = [piece.copy() for piece in arrays.pieces(array, np.dtype(dtype))]
  assert all(piece.flags.c_contiguous for piece in found)
  np.testing.assert_array_equal(
    np.concatenate([piece.reshape(-1) for piece in found]), array.reshape(-1)
  )


@pytest.mark.parametrize("kinds", ["ee", "ef", "fe", "ff"])
@pytest.mark.parametrize("layout", _LAYOUTS.values(), ids=_LAYOUTS)
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 700), (257, 65), (512, 128)])
def test_copy_casts_and_inspects_each_piece_once(shape, order, layout, kinds):
  old, new = (
    {"e": ml_dtypes.bfloat16, "f": np.dtype(np.float32)}[k] for k in kinds
  )
  values = np.arange(shape[0] * shape[1]).reshape(shape).astype(old)
  source, target = layout(values), np.zeros(shape, new, order)
  seen = []
  arrays.copy(source, target, lambda piece: seen.append(piece.size))
  np.testing.assert_array_equal(target, source.astype(new))
  assert sum(seen) == source.size


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3, 4), (0, 7), (7, 0)])
def test_copy_supports_any_number_of_axes(shape):
  source, target = np.ones(shape, np.float16), np.zeros(shape, np.float32)
  arrays.copy(source, target, lambda _: None)
  np.testing.assert_array_equal(target, source)


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3, 4)])
def test_pieces_cast_any_number_of_axes(shape):
  array = np.full(shape, 1.5, np.float32)
  found = list(arrays.pieces(array, np.dtype(np.float16)))
  assert sum(piece.size for piece in found) == array.size
  assert all((piece == 1.5).all() for piece in found)
  assert all(piece.dtype == np.float16 for piece in found)


def test_pieces_of_a_transpose_do_not_copy_the_array():
  array = np.zeros((4096, 512), np.float32).T
  sizes = {piece.nbytes for piece in arrays.pieces(array, array.dtype)}
  assert max(sizes) < array.nbytes / 1.5


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_detected_in_any_layout(dtype, bad):
  array = np.full((600, 500), -3e4).astype(dtype)
  for layout in _LAYOUTS.values():
    assert arrays.is_finite(layout(array))
  array[599, 499] = bad
  for layout in _LAYOUTS.values():
    assert not arrays.is_finite(layout(array))
