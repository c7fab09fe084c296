# SPDX-License-Identifier: Apache-2.0
"""Tests that comparison of numbers, intervals and sets matches math-verify."""

import fractions
import random

import pytest

from atlas_jax.rewards import compare

math_verify = pytest.importorskip("math_verify")

_NUM_PAIRS = 60


def _decimal(value):
  text = f"{float(value):.4f}".rstrip("0").rstrip(".")
  return text if fractions.Fraction(text) == value else f"{value}"


def _grouped(value):
  if value.denominator != 1:
    return _decimal(value)
  return f"{value.numerator:,}"


def _latex(value):
  sign = "-" if value < 0 else ""
  return rf"{sign}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def _assigned(value):
  return f"x = {_decimal(value)}"


_NUMBERS = (str, _decimal, _grouped, _latex, _assigned)


def _draw(rng):
  top = rng.choice([rng.randrange(-20, 20), rng.randrange(1000, 10**6)])
  return fractions.Fraction(top, rng.choice([1, 1, 2, 4, 5, 8]))


def _numbers(rng):
  a = _draw(rng)
  b = rng.choice([a, -a, a + 1, a * 10, a + fractions.Fraction(1, 1000)])
  return rng.choice(_NUMBERS)(a), rng.choice(_NUMBERS)(b)


def _collections(rng):
  ends = sorted({_draw(rng) for _ in range(4)})[:2]
  # Open intervals and sets are not mixed: math-verify finds them equal.
  intervals, sets = (("(", ")"), ("[", ")"), ("[", "]")), ((r"\{", r"\}"),)
  kinds = rng.choice([intervals, sets])

  def write(kind):
    low, high = (rng.choice((str, _decimal, _latex))(end) for end in ends)
    return f"{kind[0]}{low}, {high}{kind[1]}"

  first = write(rng.choice(kinds))
  if rng.random() < 0.3:
    ends = [ends[0] - 1, ends[1]]
  return first, write(rng.choice(kinds))


def _verified(a, b):
  parsed = [
    math_verify.parse(f"${text}$", parsing_timeout=0) for text in (a, b)
  ]
  assert all(parsed), (a, b)
  return math_verify.verify(*parsed, timeout_seconds=0)


@pytest.mark.parametrize("draw", [_numbers, _collections])
def test_equality_matches_math_verify(draw):
  rng = random.Random(7)
  pairs = [draw(rng) for _ in range(_NUM_PAIRS)]
  found = [compare.equal(a, b) for a, b in pairs]
  expected = [_verified(a, b) for a, b in pairs]
  differ = [
    pair
    for pair, ours, theirs in zip(pairs, found, expected, strict=True)
    if ours != theirs
  ]
  assert not differ
  assert 0.2 < sum(found) / _NUM_PAIRS < 0.8
