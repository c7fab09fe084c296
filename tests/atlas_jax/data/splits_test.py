# SPDX-License-Identifier: Apache-2.0
"""No problem is in both splits, in whatever rows or spelling."""

import hypothesis
from hypothesis import strategies as st
import pytest

from atlas_jax import errors
from atlas_jax.data import splits


def _items(*problems):
  return [
    splits.Item(f"a:{i}", splits.key(problem), (i, problem))
    for i, problem in enumerate(problems)
  ]


@hypothesis.given(
  sets=st.lists(
    st.lists(st.integers(0, 9), min_size=1, max_size=20), min_size=1, max_size=3
  ),
  fraction=st.floats(0.05, 0.6),
  seed=st.integers(0, 3),
)
def test_splits_share_no_problem_and_lose_no_row(sets, fraction, seed):
  problems = {p for rows in sets for p in rows}
  items = [_items(*map(str, rows)) for rows in sets]
  num_held_out = max(1, round(fraction * len(problems)))
  if num_held_out >= len(problems):
    with pytest.raises(errors.DataError, match="distinct problems"):
      splits.by_fraction(items, fraction, seed)
    return
  left, held_out = splits.by_fraction(items, fraction, seed)
  trained = {item.problem for rows in left for item in rows}
  kept = {item.problem for item in held_out}
  assert not trained & kept
  assert len(kept) == num_held_out
  assert len(trained) + len(kept) == len(problems)
  num_rows = sum(map(len, left)) + len(held_out)
  assert num_rows == sum(map(len, sets))
  for rows, all_rows in zip(left, items, strict=True):
    assert set(rows) <= set(all_rows)


def test_split_depends_only_on_the_seed():
  items = _items(*map(str, range(50)))
  first = splits.by_fraction([items], 0.2, 0)
  assert first == splits.by_fraction([items], 0.2, 0)
  assert first[1] != splits.by_fraction([items], 0.2, 1)[1]


@pytest.mark.parametrize(
  "other", ["what is  2 + 2?\n", "WHAT IS 2 + 2?", "What is \uff12 + 2?"]
)
def test_key_ignores_case_whitespace_and_width(other):
  assert splits.key(other) == splits.key("What is 2 + 2?")
  assert splits.key(other) != splits.key("What is 2 + 3?")


def test_rows_of_held_out_problems_are_removed():
  rows = _items("a", "b", "a", "c")
  assert splits.without(rows, _items("A", "d")) == [rows[1], rows[3]]
