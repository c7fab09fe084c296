# SPDX-License-Identifier: Apache-2.0
"""Finds numbers and arithmetic expressions in prose, and evaluates them."""

import ast
from collections.abc import Iterator
import dataclasses
import fractions
import operator
import re

from atlas_jax.rewards import quantities

# Longer expressions are read as separate numbers, larger powers are not
# computed.
_MAX_LENGTH, _MAX_POWER_BITS = 200, 10_000

_NUMERAL = rf"(?:\d+\s+(?:and\s+)?\d+/\d+(?!\d)|{quantities.NUMERAL}%?)"
_EXPRESSION = re.compile(
  rf"\(*(?:(?<![\w.)])-)?(?<![\w.]){_NUMERAL}\)*"
  rf"(?:\s*[-+*/^]\s*\(*-?{_NUMERAL}\)*)*"
)
_OPERATORS = {
  ast.Add: operator.add,
  ast.Sub: operator.sub,
  ast.Mult: operator.mul,
  ast.Div: operator.truediv,
}

# "1." and "(2)" at the start of a line or sentence.
_MARKER = re.compile(
  r"(?:(?<=[.!?:;]\s)|^[ \t]*)\(?(\d{1,2})[.)](?=\s+\S)", re.M
)
_LABEL = re.compile(
  r"\b(?:step|part|case|equation|hint|rule|grade|chapter|section)s? "
  r"\d+(?:\.\d+)*\b"
)
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6}
_PARTS = {
  2: "hal(?:f|ves)",
  3: "thirds?",
  4: "(?:quarter|fourth)s?",
  **{
    n: f"{name}s?"
    for n, name in enumerate(
      ("fifth", "sixth", "seventh", "eighth", "ninth", "tenth"), start=5
    )
  },
}
_ARTICLE = re.compile(
  rf"\ban?\s+(?=(?:{'|'.join((*_SCALES, *_PARTS.values()))})\b)"
)
# "2 hundred and 5"; nothing is added to dozens.
_SCALED = {
  size: re.compile(
    rf"\b(\d{{1,9}}(?:\.\d{{1,9}})?)[\s-]{scale}s?\b"
    + (r"(?:(?: and)? (\d{1,6})\b(?![.,/]\d))?" if size > 12 else "()")
  )
  for scale, size in _SCALES.items()
}
# A number with up to two words after it: "8 red cows".
_N = rf"((?<![\w.])-?{_NUMERAL})(?:\s+(?!and|by|from|to|with)[a-z]+){{0,2}}"
_WORDINGS = [
  (re.compile(wording.replace("N", _N)), symbols)
  for wording, symbols in (
    (r"\b(?:subtract|take) N(?: away| off)? from N", r"\2 - \1"),
    (r"\bdivide N by N", r"\1 / \2"),
    (r"\bmultiply N (?:by|with|and) N", r"\1 * \2"),
    (r"\b(?:add|sum of) N (?:and|to|with) N", r"\1 + \2"),
    (r"\bdifference (?:of|between) N and N", r"\1 - \2"),
    (r"\bproduct of N and N", r"\1 * \2"),
    (r"\b(?:double|twice) N", r"2 * \1"),
    (r"\bhalve N", r"\1 / 2"),
    (r"N,? (?:and|then) divide (?:it|this|that) by N", r"\1 / \2"),
    (r"N,? (?:and|then) multiply (?:it|this|that) by N", r"\1 * \2"),
    (r"N goes into N", r"\2 / \1 = "),
    (r"N less than N", r"\2 - \1"),
    (r"N more than N", r"\1 + \2"),
  )
]
_SUBSTITUTIONS = [
  (re.compile(pattern), replacement)
  for pattern, replacement in (
    (r"\b(?:none|nothing)(?= (?:(?:is|are) )?(?:left|remain))", "0"),
    (r"(?:->|=>|\\(?:to|(?:long)?rightarrow)\b|\u2192)", "="),
    (r"(?<![\d)] )\b(?:negative|minus)\s+(?=\d)", "-"),
    (r"\bhalf\b", "1/2"),
    (r"\b(?<=is |re )a right angle\b", "90"),
    (r"(?<=\d)\s*(?:percent|per cent)\b", "%"),
    *_WORDINGS,
    (r"(?<=\d\))\s*(?=\(\d)", " * "),
    (r"(?<=[\d)])\s*(?:x|times|and by)\s*(?=[\d(])", " * "),
    (r"(?<=[\d)])\s+plus\s+(?=[\d(])", " + "),
    (r"(?<=[\d)])\s+minus\s+(?=[\d(])", " - "),
    (r"(?<=[\d)])\s+(?:divided by|over)\s+(?=[\d(])", " / "),
    (r"(?<=\d)\s+(?:in|out of)\s+(?=\d)", "/"),
    (r"(?<=[\d%])\s+of\s+(?=\d)", " * "),
  )
]


@dataclasses.dataclass(frozen=True)
class Expression:
  """A number, or an expression of several, at text[start:end].

  A fraction without spaces is one number unless its value is an integer: 17/4
  has one operand, 24/2 and 17 / 4 have two.
  """

  start: int
  end: int
  value: fractions.Fraction
  operands: tuple[fractions.Fraction, ...]


def read(text: str) -> str:
  """Normalizes a text, with number words and operations in symbols.

  Markers of lists ("1.") are removed if a neighbour is present, and labels
  ("step 2") always.
  """
  text = quantities.normalized(text)
  markers = {int(match[1]) for match in _MARKER.finditer(text)}
  text = _MARKER.sub(
    lambda m: "" if markers & {int(m[1]) - 1, int(m[1]) + 1} else m[0], text
  )
  text = _LABEL.sub("", text).replace("half a dozen", "6")
  text = _ARTICLE.sub("1 ", text)
  for size, pattern in _SCALED.items():

    def scaled(match: re.Match[str], size: int = size) -> str:
      return str(fractions.Fraction(match[1]) * size + int(match[2] or 0))

    text = pattern.sub(scaled, text)
  for size, part in _PARTS.items():
    text = re.sub(rf"\b(\d+)[\s-]{part}\b", rf"\1/{size}", text)
  for pattern, replacement in _SUBSTITUTIONS:
    text = pattern.sub(replacement, text)
  return text


def find(text: str) -> Iterator[Expression]:
  """Yields the numbers and expressions of a text that `read` returned."""
  for match in _EXPRESSION.finditer(text):
    numerals = [
      (number, numeral)
      for numeral in re.finditer(_NUMERAL, match[0])
      if (number := quantities.parse(numeral[0])) is not None
    ]
    operands = tuple(number.value for number, _ in numerals)
    value = _evaluate(match[0], operands)
    if value is not None:
      is_number = len(operands) == 1 or (
        value.denominator > 1 and re.fullmatch(r"\(*-?\d+/\d+\)*", match[0])
      )
      yield Expression(
        match.start(), match.end(), value, (value,) if is_number else operands
      )
      continue
    for number, numeral in numerals:
      start = match.start()
      yield Expression(
        start + numeral.start(),
        start + numeral.end(),
        number.value,
        (number.value,),
      )


def _evaluate(
  text: str, operands: tuple[fractions.Fraction, ...]
) -> fractions.Fraction | None:
  """Returns the value of an expression, or None if it has none."""
  # Parentheses of the prose around it: "(3", "2 * 3)".
  unclosed = text.count("(") - text.count(")")
  text = text[unclosed:] if unclosed > 0 else text[: len(text) + unclosed]
  if len(text) > _MAX_LENGTH:
    return None
  formula = re.sub(_NUMERAL, "n", text).replace("^", "**")
  try:
    return _value(ast.parse(formula, mode="eval").body, iter(operands))
  except (SyntaxError, ValueError, ZeroDivisionError, StopIteration):
    return None


def _value(
  node: ast.expr, operands: Iterator[fractions.Fraction]
) -> fractions.Fraction:
  """Evaluates an expression whose names are the operands, in order."""
  match node:
    case ast.Name():
      return next(operands)
    case ast.UnaryOp(op=ast.USub(), operand=operand):
      return -_value(operand, operands)
    case ast.BinOp(left=left, op=op, right=right):
      a, b = _value(left, operands), _value(right, operands)
      if type(op) in _OPERATORS:
        return _OPERATORS[type(op)](a, b)
      bits = max(a.numerator.bit_length(), a.denominator.bit_length())
      if b.denominator == 1 and abs(b) * bits <= _MAX_POWER_BITS:
        return fractions.Fraction(a ** int(b))
  raise ValueError("Not an arithmetic expression.")
