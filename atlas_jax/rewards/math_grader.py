# SPDX-License-Identifier: Apache-2.0
"""Grades with math-verify; run by `isolated.Pool`, because it may hang.

math-verify compares single expressions, equations and matrices. Tuples, sets
and intervals are split here: it parses (1, 2) as an interval, and finds that
all empty intervals, such as (2, 1) and (3, 1), are equal.
"""

from collections.abc import Sequence
import logging
import re
from typing import Any

from latex2sympy2_extended import math_normalization
import math_verify
import sympy

from atlas_jax.rewards import answers, compare, plain

# It warns about each call without a timeout.
logging.getLogger("math_verify").setLevel(logging.ERROR)

# math-verify rounds decimals to this many places.
_NUM_DECIMALS = 8
_BASE = re.compile(r"\d_\{?(\d+)")
# Units would be dropped from products: 3ab would equal 3.
_LATEX = math_verify.LatexExtractionConfig(
  normalization_config=math_normalization.NormalizationConfig(
    basic_latex=True,
    units=False,
    malformed_operators=True,
    nits=True,
    boxed="none",
    equations=False,
  )
)
# The letter i alone or after one letter: 3 + 2i, a + bi.
_IMAGINARY = re.compile(r"(?<![a-zA-Z\\])[a-zA-Z]?i(?![a-zA-Z])")
_COLUMN = re.compile(r"\\begin\s*\{[bp]matrix\}([^&]*?)\\end\s*\{[bp]matrix\}")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def grade(pair: Sequence[str]) -> bool | None:
  """Returns whether an answer equals the reference.

  math-verify's own timeouts are disabled: they need signals, and the caller
  kills this process at its deadline.

  Args:
    pair: a student's full answer, and the reference answer or solution.

  Returns:
    None if math-verify cannot parse the reference; any answer would be graded
    as wrong.
  """
  answer, reference = (
    _COLUMN.sub(_tuple, plain.latex(answers.of_reference(text)))
    for text in pair
  )
  try:
    return _equal(answer, reference)
  except _NotParsedError:
    return None


class _NotParsedError(ValueError):
  """math-verify cannot parse a part of the reference."""


def _equal(answer: str, reference: str) -> bool:
  """Compares members by rules, else by math-verify."""
  answer, reference = map(compare.plus_minus, (answer, reference))
  if compare.equal(answer, reference):
    return True
  (a_brackets, ours), (b_brackets, theirs) = map(
    compare.parts, (answer, reference)
  )
  if len(ours) == len(theirs) == 1 and a_brackets == b_brackets:
    if (ours, theirs) == ([answer], [reference]):
      return _verified(answer, reference)
    return _equal(ours[0], theirs[0])
  if a_brackets != b_brackets and 1 in (len(ours), len(theirs)):
    return _verified(answer, reference)  # x > 3 and (3, \infty).
  if a_brackets != b_brackets or len(ours) != len(theirs):
    return False
  if a_brackets:
    return all(map(_equal, ours, theirs))
  for member in ours:
    equal = [other for other in theirs if _equal(member, other)]
    if not equal:
      return False
    theirs.remove(equal[0])
  return True


def _tuple(column: re.Match[str]) -> str:
  """Writes a column vector as a tuple."""
  return "(" + ", ".join(column[1].split(r"\\")) + ")"


def _verified(answer: str, reference: str) -> bool:
  """Compares two expressions, equations or matrices."""
  if compare.is_number(answer) and compare.is_number(reference):
    return False  # `compare.equal` is exact on numbers.
  if _BASE.findall(answer) != _BASE.findall(reference):
    return False  # math-verify ignores the base of a number.
  # An equation is equal to another equation only.
  if not _is_equation(answer) or not _is_equation(reference):
    answer, reference = map(compare.without_name, (answer, reference))
    if _is_equation(answer) or _is_equation(reference):
      return False
  is_complex = bool(_IMAGINARY.search(f"{answer} {reference}"))
  truth = _parse(reference, is_complex=is_complex)
  if not truth:
    raise _NotParsedError
  return bool(
    math_verify.verify(
      truth,
      _parse(answer, is_complex=is_complex),
      float_rounding=_NUM_DECIMALS,
      allow_set_relation_comp=True,
      timeout_seconds=0,
      raise_on_error=True,
    )
  )


def _is_equation(text: str) -> bool:
  return compare.without_name(text) != text or "=" in text


# Any: sympy's expressions, and strings.
def _parse(text: str, *, is_complex: bool) -> list[Any]:
  """Parses LaTeX; if `is_complex`, i is the imaginary unit."""
  parsed = math_verify.parse(
    f"${_THOUSANDS.sub('', text)}$",
    [_LATEX],
    fallback_mode="no_fallback",
    parsing_timeout=0,
    raise_on_error=True,
  )
  if not is_complex:
    return parsed
  return [_complex(e) if isinstance(e, sympy.Basic) else e for e in parsed]


def _complex(expression: sympy.Basic) -> sympy.Basic:
  """Replaces the symbol i, and drops the assumption that others are real."""
  return expression.xreplace(
    {
      symbol: sympy.I if symbol.name == "i" else sympy.Symbol(symbol.name)
      for symbol in expression.atoms(sympy.Symbol)
    }
  )
