# SPDX-License-Identifier: Apache-2.0
"""Tests the search for numbers and expressions in prose."""

import fractions

import pytest

from atlas_jax.rewards import expressions


@pytest.mark.parametrize(
  ("text", "values"),
  [
    ("4 boxes of 3", [4, 3]),
    ("subtract 8 cows from 48", [40]),
    ("divide 36 by 3, then add 2", [12, 2]),
    ("12 plus five", [17]),
    ("twice 6, half of 24", [12, 12]),
    ("3 less than 20", [17]),
    ("15 goes into 105 seven times", [7, 7]),
    ("two dozen and half a dozen", [24, 6]),
    ("one thousand two hundred eighty-four", [1284]),
    ("1.5 million", [1_500_000]),
    ("three quarters", ["3/4"]),
    (r"\frac{17}{4}", ["17/4"]),
    ("1 1/2", ["3/2"]),
    ("25 percent", ["1/4"]),
    ("2 + 3 * 4 - 2^3", [6]),
    ("(2 + 1)(1 + 1)", [6]),
    ("minus 3", [-3]),
    ("7 minus 3", [4]),
    ("(see 3)", [3]),
    ("(3 apples)", [3]),
    ("1. Add. 2. Stop.", []),
    ("step 2: stop", []),
    ("1/0", [1, 0]),
    ("no numbers", []),
  ],
)
def test_numbers_and_expressions_are_evaluated(text, values):
  found = expressions.find(expressions.read(text))
  assert [each.value for each in found] == list(map(fractions.Fraction, values))


@pytest.mark.parametrize(
  ("text", "operands"),
  [
    ("17/4", ["17/4"]),
    ("17 / 4", [17, 4]),
    ("24/2", [24, 2]),
    ("-3", [-3]),
    ("5 - 3", [5, 3]),
  ],
)
def test_a_fraction_is_one_operand_unless_it_is_an_integer(text, operands):
  (found,) = expressions.find(text)
  assert found.operands == tuple(map(fractions.Fraction, operands))
  assert text[found.start : found.end] == text
