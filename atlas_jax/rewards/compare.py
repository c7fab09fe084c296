# SPDX-License-Identifier: Apache-2.0
r"""Compares answers exactly as numbers, tuples, sets, choices or text.

Numbers are fractions, never rounded floats: 1,500 equals 1500, 1/2 equals 0.5,
50% equals 0.5 (not 50), and 0.001 differs from 0.004. For symbolic equality see
`rules.open_math`, which uses math-verify.
"""

from collections.abc import Hashable, Iterator
import dataclasses
import fractions
import re

from atlas_jax.rewards import plain

NUMERAL = (
  r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)"
  r"(?:e[-+]?\d{1,3}(?!\w))?"
)
# A minus after a word or a bracket is a subtraction, not a sign.
NUMBER = re.compile(
  rf"(?:(?<![\w.)])[-+])?(?<!\d)(?<!\d\.){NUMERAL}", re.IGNORECASE
)
DIVISOR = re.compile(rf"\s*/\s*({NUMERAL})", re.IGNORECASE)
PERCENT = re.compile(r"\s*(?:%|percent\b|per cent\b)", re.IGNORECASE)

_SCALES = {
  **{"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6},
  **{"billion": 10**9, "trillion": 10**12},
}
_QUANTITY = re.compile(
  rf"(?P<sign>[-+]?)\s*(?:(?P<whole>\d+)\s+(?:and\s+)?(?=\d+\s*/))?"
  rf"(?P<top>{NUMERAL})(?:\s*/\s*(?P<minus>-?)(?P<bottom>{NUMERAL})"
  r"|\s*\^\s*\{?(?P<power>-?\d{1,3})\}?(?!\d))?"
  rf"(?:\s*(?P<scale>{'|'.join(_SCALES)})s?\b)?"
  rf"(?:(?P<percent>{PERCENT.pattern})|(?P<unit>\s*[a-z][a-z/^ ]*[23]?))?"
)
# These change a number's value, so they are not units to be dropped.
_NOT_UNITS = re.compile(
  r"\b(?:half|halves|thirds?|quarters?|and|or|to|not|than|pi|sqrt|sin|cos|tan|log|ln|exp|"
  rf"mod|{'|'.join(_SCALES)})\b"
)
# All other words of one or two letters are read as variables, not units.
_SHORT_UNIT = re.compile(
  r"am|an|as|at|by|cl|cm|db|dl|ft|g|gb|h|hr|hz|in|is|j|kb|kg|km|kw|l|lb|m|mb|"
  r"mg|mi|ml|mm|ms|mw|no|of|oz|pa|pm|s|sq|tb|v|w|yd"
)
_WORD = re.compile(r"[a-z]+")
# Units that are converted. Two answers with different units differ only if both
# units are listed here.
_UNITS = {
  name: (kind, fractions.Fraction(size))
  for kind, sizes in {
    "length": {
      "mm millimeter millimetre": "0.001",
      "cm centimeter centimetre": "0.01",
      "m meter metre": "1",
      "km kilometer kilometre": "1000",
    },
    "mass": {"mg milligram": "0.001", "g gram": "1", "kg kilogram": "1000"},
    "time": {
      "s sec second": "1",
      "min minute": "60",
      "h hr hour": "3600",
      "day": "86400",
      "week": "604800",
    },
    "volume": {"ml milliliter millilitre": "0.001", "l liter litre": "1"},
  }.items()
  for names, size in sizes.items()
  for name in names.split()
}
# Longer numerals are not parsed: int() rejects strings above 4300 digits.
_MAX_DIGITS = 1000
# Only the last characters of longer answers are compared.
_MAX_LENGTH = 10_000

# fmt: off
_SMALL = (
  "zero", "one", "two", "three", "four", "five", "six", "seven", "eight",
  "nine", "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen",
  "sixteen", "seventeen", "eighteen", "nineteen",
)
_TENS = (
  "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety",
)
# fmt: on
_WORDS = {word: value for value, word in enumerate(_SMALL)} | {
  word: 10 * value for value, word in enumerate(_TENS, start=2)
}
_NUMBER_WORD = re.compile(
  rf"\b(?:(?P<tens>{'|'.join(_TENS)})(?:[-\s](?P<ones>{'|'.join(_SMALL[1:10])}))?"
  rf"|(?P<small>{'|'.join(_SMALL)}))\b"
)

_PREFIX = re.compile(r"(?:approximately|approx\.?|about|roughly|exactly)\s+")
_NEGATIVE = re.compile(r"(?:negative|minus)\s+(?=[\d.])")
_MEMBER = re.compile(r"[a-z]\s*(?:\\in\b|\u2208)\s*")
_CHOICE = re.compile(
  r"(?:(?:option|choice)\s+)?(?P<open>\()?(?P<letter>[a-j])"
  r"(?P<close>(?(open)\)[.:]?|[).:]))?(?P<rest>\s+\S.*)?",
  re.DOTALL,
)
_VERDICT = re.compile(r"(yes|no|true|false)\b(?:[,.;:!].*)?", re.DOTALL)
_GROUP = re.compile(r"\{(\w)\}")
_AND = re.compile(r"\s*(?:\band\b|\bor\b|;)\s*")


@dataclasses.dataclass(frozen=True)
class Quantity:
  """A number and its unit; the unit is empty unless it is in `_UNITS`."""

  value: fractions.Fraction
  unit: str = ""


def equal(a: str, b: str) -> bool:
  """Returns whether two answers are equal.

  If both parse as numbers, their values are compared: currency, LaTeX wrappers,
  thousands separators and a trailing period are dropped. Units are dropped too,
  unless both sides have a known one: 1 km equals 1000 m, 5 m differs from 5 cm.
  Number words up to ninety-nine are parsed. Tuples and intervals are compared
  by brackets and members, sets and lists of numbers by members in any order,
  choices by their letters, and other answers by text, ignoring case and
  whitespace. Only the part after the last `=` of an equation is compared. An
  empty answer equals nothing.
  """
  a_text, b_text = right_side(a), right_side(b)
  a_number, b_number = quantity(a_text), quantity(b_text)
  if a_number is not None and b_number is not None:
    return _same_quantity(a_number, b_number)
  a_letter, b_letter = _letter(a_text), _letter(b_text)
  if a_letter and b_letter and 1 in (len(a_letter), len(b_letter)):
    return a_letter[0] == b_letter[0]
  return bool(a_text) and _key(a_text) == _key(b_text)


def normalized(text: str) -> str:
  """Returns plain lower-case text with number words replaced by digits."""

  def digits(match: re.Match[str]) -> str:
    return str(sum(_WORDS[word] for word in match.groups() if word))

  return _NUMBER_WORD.sub(digits, plain.text(text).casefold())


def right_side(answer: str) -> str:
  """Normalizes an answer and drops everything up to its last `=`."""
  text = trimmed(normalized(answer[-_MAX_LENGTH:]))
  sides = [part for part in _split(text) if "=" in part]
  if len(sides) < 2:  # Of several equations, `_member` splits each one.
    text = text.rsplit("=", maxsplit=1)[-1]
  text = _PREFIX.sub("", _MEMBER.sub("", trimmed(text), count=1), count=1)
  return trimmed(_NEGATIVE.sub("-", text) if _NEGATIVE.match(text) else text)


def trimmed(text: str) -> str:
  """Strips punctuation around an answer, but keeps the point of .5."""
  return text.rstrip(" \t\r\n.,;:!*\"'").lstrip(" \t\r\n:*\"'")


def quantity(text: str) -> Quantity | None:
  """Parses a whole normalized answer as a number; None if it is not one."""
  while text.startswith("(") and text.endswith(")"):
    text = text[1:-1].strip()
  match = _QUANTITY.fullmatch(text)
  if match is None or not _is_unit(match["unit"] or ""):
    return None
  value, divisor = fraction(match["top"]), fraction(match["bottom"] or "1")
  whole, power = fraction(match["whole"] or "0"), int(match["power"] or "1")
  if value is None or not divisor or whole is None:
    return None
  if abs(power) * len(match["top"]) > _MAX_DIGITS or (power < 0 and not value):
    return None
  value = whole + value**power / divisor
  value *= _SCALES.get(match["scale"], 1)
  if match["percent"]:
    value /= 100
  if (match["sign"] == "-") != (match["minus"] == "-"):
    value = -value
  unit = (match["unit"] or "").strip()
  unit = unit if unit in _UNITS else unit.removesuffix("s")
  return Quantity(value, unit if unit in _UNITS else "")


def fraction(numeral: str) -> fractions.Fraction | None:
  """Parses one numeral exactly; None if it is too long."""
  if len(numeral) > _MAX_DIGITS:
    return None
  return fractions.Fraction(numeral.replace(",", ""))


def _is_unit(text: str) -> bool:
  """Returns whether the text after a number is a unit that can be dropped."""
  return not _NOT_UNITS.search(text) and all(
    len(word) > 2 or _SHORT_UNIT.fullmatch(word) for word in _WORD.findall(text)
  )


def _same_quantity(a: Quantity, b: Quantity) -> bool:
  if a.unit and b.unit:
    (a_kind, a_size), (b_kind, b_size) = _UNITS[a.unit], _UNITS[b.unit]
    return a_kind == b_kind and a.value * a_size == b.value * b_size
  return a.value == b.value


def _letter(text: str) -> str:
  """Returns a choice's letter, with a star if the choice's text follows it."""
  match = _CHOICE.fullmatch(text)
  if match is None or (match["rest"] and not match["close"]):
    return ""
  return match["letter"] + ("*" if match["rest"] else "")


def _key(text: str) -> Hashable:
  """Returns a key that two normalized answers share if they are equal."""
  if "\\cup" in text:
    return frozenset(map(_span, text.split("\\cup")))
  if text.startswith("{") and text.endswith("}"):
    members = frozenset(map(_member, _split(text[1:-1])))
    return next(iter(members)) if len(members) == 1 else members
  members = [_member(part) for part in _split(text)]
  if len(members) > 1 and all(
    isinstance(member, fractions.Fraction) for member in members
  ):
    return frozenset(members)
  verdict = _VERDICT.fullmatch(text)
  return verdict[1] if verdict else _span(text)


def _span(text: str) -> Hashable:
  """Parses an interval or a tuple, else a single member."""
  text = text.strip()
  if text[:1] in ("(", "[") and text[-1:] in (")", "]"):
    members = tuple(_member(part) for part in _split(text[1:-1]))
    if len(members) > 1:
      return (text[0], *members, text[-1])
  return _member(text)


def _member(text: str) -> Hashable:
  """Parses a number, else returns the text without whitespace."""
  text = right_side(text)
  number = quantity(text)
  return _letters(text) if number is None else number.value


def _letters(text: str) -> str:
  """Removes whitespace, braces around one character, and implied `*`."""
  text = _GROUP.sub(r"\1", "".join(text.split()))
  return re.sub(r"(?<=[\d)])\*(?=[a-z(])", "", text)


def _split(text: str) -> list[str]:
  """Splits a list at separators outside of brackets.

  If any comma is followed by a space, commas without one belong to numbers.
  """
  comma = ", " if ", " in text else ","
  parts, depth, start = [], 0, 0
  for i, character in enumerate(text):
    depth += (character in "([{") - (character in ")]}")
    if depth == 0 and text.startswith(comma, i):
      parts.append(text[start:i])
      start = i + len(comma)
  parts.append(text[start:])
  split = [piece for part in parts for piece in _AND.split(part)]
  return [piece for piece in split if piece.strip()]


def numbers(text: str) -> Iterator[tuple[int, fractions.Fraction]]:
  """Yields the start and value of every number in normalized text.

  A quotient also yields its value, and a percentage its fraction, at the same
  start.
  """
  for match in NUMBER.finditer(text):
    value = fraction(match[0])
    if value is None:
      continue
    yield match.start(), value
    if PERCENT.match(text, match.end()):
      yield match.start(), value / 100
    divided = DIVISOR.match(text, match.end())
    divisor = fraction(divided[1]) if divided else None
    if divisor:
      yield match.start(), value / divisor
