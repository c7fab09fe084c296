# SPDX-License-Identifier: Apache-2.0
"""Packing moves tokens; it never loses or mixes them or adds targets."""

import collections

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from atlas_jax import errors
from atlas_jax.data import packing

_LENGTH = 12
_EXAMPLES = st.lists(
  st.lists(
    st.tuples(st.integers(1, 99), st.booleans()), min_size=1, max_size=_LENGTH
  ).map(lambda pairs: tuple(zip(*pairs, strict=True))),
  min_size=1,
  max_size=30,
)
_LONG = (list(range(1, 21)), [False] * 5 + [True] * 15)
_SHORT = ([1, 2, 3], [False, True, True])
_PROMPT_ONLY = (list(range(1, 21)), [False] * 15 + [True] * 5)


def _unpack(arrays):
  """Returns every segment as (tokens, loss mask, positions)."""
  segments = []
  for row in range(len(arrays["token_ids"])):
    ids = arrays["segment_ids"][row]
    for segment in range(1, ids.max() + 1):
      (where,) = np.nonzero(ids == segment)
      assert np.array_equal(where, np.arange(where[0], where[-1] + 1))
      segments.append(
        tuple(
          tuple(arrays[name][row, where].tolist())
          for name in ("token_ids", "loss_mask", "positions")
        )
      )
  return segments


def _expected(examples):
  return [
    (tuple(ids), (False, *mask[1:]), tuple(range(len(ids))))
    for ids, mask in examples
  ]


@pytest.mark.parametrize("layout", [packing.pack, packing.pad])
@hypothesis.given(examples=_EXAMPLES)
def test_every_example_is_unpacked_unchanged(layout, examples):
  arrays, _, num_too_long = layout(examples, _LENGTH, too_long="error")
  assert num_too_long == 0
  assert collections.Counter(_unpack(arrays)) == collections.Counter(
    _expected(examples)
  )


@hypothesis.given(examples=_EXAMPLES)
def test_padding_is_zero_in_all_arrays_and_at_the_end(examples):
  arrays, *_ = packing.pack(examples, _LENGTH, too_long="error")
  padding = arrays["segment_ids"] == 0
  for array in arrays.values():
    assert array.shape == padding.shape
    assert not array[padding].any()
  assert np.array_equal(padding, np.sort(padding, axis=1))


@hypothesis.given(examples=_EXAMPLES)
def test_no_two_rows_fit_into_one(examples):
  arrays, *_ = packing.pack(examples, _LENGTH, too_long="error")
  used = sorted((arrays["segment_ids"] > 0).sum(axis=1))
  assert len(used) < 2 or used[0] + used[1] > _LENGTH


def test_long_examples_are_placed_before_short_ones_fill_their_rows():
  examples = [([1] * n, [True] * n) for n in (5, 5, 7, 7)]
  arrays, *_ = packing.pack(examples, _LENGTH, too_long="error")
  assert len(arrays["token_ids"]) == 2


def test_pad_keeps_the_order():
  examples = [_SHORT, ([7], [True]), _SHORT]
  arrays, *_ = packing.pad(examples, 4, too_long="error")
  assert arrays["token_ids"].tolist() == [
    [1, 2, 3, 0],
    [7, 0, 0, 0],
    [1, 2, 3, 0],
  ]
  assert {name: array.dtype.name for name, array in arrays.items()} == {
    "token_ids": "int32",
    "loss_mask": "bool",
    "segment_ids": "int32",
    "positions": "int32",
  }


def test_too_long_is_dropped_and_counted():
  arrays, _, num_too_long = packing.pack(
    [_LONG, _SHORT, _LONG], _LENGTH, too_long="drop"
  )
  assert num_too_long == 2
  assert _unpack(arrays) == _expected([_SHORT])


def test_too_long_is_truncated_if_a_target_remains():
  arrays, _, num_too_long = packing.pad(
    [_LONG, _PROMPT_ONLY, _SHORT], _LENGTH, too_long="truncate"
  )
  assert num_too_long == 2
  cut = (_LONG[0][:_LENGTH], _LONG[1][:_LENGTH])
  assert _unpack(arrays) == _expected([cut, _SHORT])


def test_too_long_is_an_error_that_names_the_example():
  with pytest.raises(errors.DataError, match="Example 2"):
    packing.pack([_SHORT, _LONG], _LENGTH, too_long="error")


def test_no_example_left_is_an_error():
  with pytest.raises(errors.DataError, match="No example fits"):
    packing.pack([_LONG], _LENGTH, too_long="drop")


@pytest.mark.parametrize("example", [([], []), ([1, 2], [True])])
def test_mismatched_example_is_rejected(example):
  with pytest.raises(ValueError, match="Example 1 must have"):
    packing.pack([example], _LENGTH, too_long="drop")


def test_unknown_too_long_is_rejected():
  with pytest.raises(ValueError, match="too_long"):
    packing.pack([_SHORT], _LENGTH, too_long="wrap")


def test_rows_longer_than_the_context_are_rejected():
  packing.check_context(512, 512)
  with pytest.raises(errors.ConfigError, match="max_position_embeddings=512"):
    packing.check_context(513, 512)


@pytest.mark.parametrize(
  ("length", "context", "expected"),
  [(0, 2048, 2048), (0, 131_072, 16_384), (512, 2048, 512), (2048, 2048, 2048)],
)
def test_rows_without_a_length_fill_the_context(length, context, expected):
  assert packing.row_length(length, context) == expected
  with pytest.raises(errors.ConfigError, match="at most"):
    packing.row_length(context + 1, context)
