# SPDX-License-Identifier: Apache-2.0
"""Parses numbers: as digits or words, with scales, percent signs and units.

Numbers are fractions, never rounded floats.
"""

from collections.abc import Iterator
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
SCALE = rf"(?:{'|'.join(_SCALES)})s?"
_QUANTITY = re.compile(
  rf"(?P<sign>[-+]*)\s*(?:(?P<whole>\d+)\s+(?:and\s+)?(?=\d+\s*/))?"
  rf"(?P<top>{NUMERAL})(?:\s*/\s*(?P<minus>-?)(?P<bottom>{NUMERAL})"
  r"|\s*\^\s*\{?(?P<power>-?\d{1,3})\}?(?!\d))?"
  rf"(?:\s*(?P<scale>{'|'.join(_SCALES)})s?\b)?"
  rf"(?P<percent>{PERCENT.pattern})?(?P<unit>[\s-]*[a-z][a-z/^\s-]*[23]?)?"
)
# These change a number's value, so they are not units to be dropped.
_NOT_UNITS = re.compile(
  r"\b(?:and|or|to|not|than|pi|sqrt|sin|cos|tan|log|ln|exp|mod|am|pm|percent|"
  rf"{SCALE})\b"
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
      "in inch inche": "0.0254",
      "ft foot feet": "0.3048",
      "yd yard": "0.9144",
      "mi mile": "1609.344",
    },
    "mass": {
      "mg milligram": "0.001",
      "g gram": "1",
      "kg kilogram": "1000",
      "oz ounce": "28.349523125",
      "lb pound": "453.59237",
    },
    "time": {
      "ms millisecond": "0.001",
      "s sec second": "1",
      "min minute": "60",
      "h hr hour": "3600",
      "day": "86400",
      "week": "604800",
    },
    "months": {"month": "1", "year": "12"},
    "volume": {"ml milliliter millilitre": "0.001", "l liter litre": "1"},
    "length/time": {"mph": "0.44704", "kph": "5/18"},
    "dollars": {"dollar usd buck": "1", "cent": "0.01"},
    "euros": {"euro eur": "1"},
  }.items()
  for names, size in sizes.items()
  for name in names.split()
}
# Other units, nouns whose plural has no s, and words that follow a count.
# fmt: off
_PLAIN_UNITS = (
  "a", "altogether", "an", "as", "at", "by", "children", "cl", "cubic", "cup",
  "deer", "degree", "dl", "each", "fish", "gallon", "gb", "geese", "hz", "j",
  "joule", "kb", "kw", "left", "less", "mb", "men", "mice", "mole", "more",
  "newton", "no", "of", "old", "pa", "people", "per", "peso", "pint", "point",
  "quart", "radian", "remaining", "rupee", "sheep", "sq", "square", "tb",
  "teeth", "time", "ton", "tonne", "total", "unit", "v", "volt", "w", "watt",
  "women", "yen",
)
# fmt: on
_OF = re.compile(r"^[\s-]*(?:of\s+)?(?:an?\s+)?|\s+$")
_RATIO_UNIT = re.compile(r"\s*/\s*|\s+per\s+(?:an?\s+)?")
_UNIT = re.compile(
  r"(?:(?P<square>square|sq)\s+|(?P<cubic>cubic)\s+)?(?P<name>[a-z]+)"
  r"(?:\^?(?P<power>[23]))?"
)
# Longer numerals are not parsed: int() rejects strings above 4300 digits.
_MAX_DIGITS = 1000
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
_HALVES = {
  **{"half": 2, "halve": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5},
  **{"sixth": 6, "seventh": 7, "eighth": 8, "ninth": 9, "tenth": 10},
}
_PART = re.compile(rf"\b(\d+)[\s-]+({'|'.join(_HALVES)})s?\b")
_ONE = re.compile(rf"\ban?\s+(?=(?:{'|'.join(_HALVES)}|{SCALE})\b)")
_BARE_SCALE = re.compile(rf"(?=(?:half|{SCALE})\b)")
_COMPOUND = re.compile(
  rf"\b\d+(?:\s+{SCALE})+(?:\s+(?:and\s+)?\d+\b(?!\s*/)(?:\s+{SCALE}\b)*)+"
)
# Thousands separated by spaces: 1 000 000.
_SPACED = re.compile(r"[-+]?\d{1,3}(?:\s\d{3})+(?![\d/])")
# Decimals of at least this many digits may be rounded quotients.
_MIN_ROUNDED_DIGITS = 8
# 1 hour and 30 minutes.
_MAX_SUM = 60
_SUM = re.compile(r"(\d[^,]*?[a-z])(?:,\s*|\s+)(?:and\s+)?(\d+ ?[a-z]+)")


@dataclasses.dataclass(frozen=True)
class Quantity:
  """A number and its unit.

  Attributes:
    value: a percentage is divided by 100.
    kind: dimension of the unit, with `size` in its base unit; empty if the unit
      is not in `_UNITS`.
    size: see `kind`.
    is_percent: whether the number has a percent sign.
    is_quotient: whether the number has a fraction bar.
    step: value of the last digit of a long decimal, else 0.
  """

  value: fractions.Fraction
  kind: str = ""
  size: fractions.Fraction = fractions.Fraction(1)
  is_percent: bool = False
  is_quotient: bool = False
  step: fractions.Fraction = fractions.Fraction(0)


def parse(text: str) -> Quantity | None:
  """Parses a whole normalized answer as a number; None if it is not one."""
  while text.startswith("(") and text.endswith(")"):
    text = text[1:-1].strip()
  match = _QUANTITY.fullmatch(text)
  if match is None:
    return _sum(text)
  value, divisor = fraction(match["top"]), fraction(match["bottom"] or "1")
  whole, power = fraction(match["whole"] or "0"), int(match["power"] or "1")
  if value is None or not divisor or whole is None:
    return None
  if abs(power) * len(match["top"]) > _MAX_DIGITS or (power < 0 and not value):
    return None
  value = whole + value**power / divisor
  if not _is_unit(match["unit"] or "", is_one=value == 1):
    return None
  scale = fractions.Fraction(_SCALES.get(match["scale"], 1))
  scale /= 100 if match["percent"] else 1
  if (match["sign"].count("-") + (match["minus"] == "-")) % 2:
    scale = -scale
  step = fractions.Fraction(0)
  decimals = match["top"].partition(".")[2]
  num_digits = len(re.sub(r"\D", "", match["top"]).lstrip("0"))
  if decimals.isdigit() and num_digits >= _MIN_ROUNDED_DIGITS:
    step = abs(scale) / 10 ** len(decimals)
  kind, size = unit(match["unit"] or "")
  return Quantity(
    value * scale,
    kind,
    size,
    is_percent=bool(match["percent"]),
    is_quotient=bool(match["bottom"]),
    step=step,
  )


def same(answer: Quantity, reference: Quantity) -> bool:
  """Returns whether an answer is the quantity that the reference asks for."""
  if answer.kind and reference.kind:
    return (
      answer.kind == reference.kind
      and answer.value * answer.size == reference.value * reference.size
    )
  omits_percent = reference.is_percent and not answer.is_percent
  return (
    answer.value == reference.value
    or (omits_percent and answer.value == reference.value * 100)
    or _rounds_to(answer, reference)
    or _rounds_to(reference, answer)
  )


def normalized(text: str) -> str:
  """Returns plain lower-case text with number words replaced by digits."""

  def digits(match: re.Match[str]) -> str:
    return str(sum(_WORDS[word] for word in match.groups() if word))

  return _NUMBER_WORD.sub(digits, plain.text(text).casefold())


def digits_of_words(text: str) -> str:
  """Replaces 3 thousand 5 hundred, a dozen, half, 2 thirds and 1 000."""

  def compound(match: re.Match[str]) -> str:
    total = part = 0
    for word in re.findall(r"\d+|[a-z]+", match[0]):
      scale = _SCALES.get(word.removesuffix("s"), 1)
      if word.isdigit():
        part += int(word)
      elif scale > 100:
        total, part = total + part * scale, 0
      else:
        part *= scale
    return str(total + part)

  text = _ONE.sub("1 ", text)
  if _BARE_SCALE.match(text):
    text = f"1 {text}"
  text = _COMPOUND.sub(compound, text)
  text = _PART.sub(lambda match: f"{match[1]}/{_HALVES[match[2]]}", text)
  spaced = _SPACED.match(text)
  return "".join(spaced[0].split()) + text[spaced.end() :] if spaced else text


def fraction(numeral: str) -> fractions.Fraction | None:
  """Parses one numeral exactly; None if it is too long."""
  if len(numeral) > _MAX_DIGITS:
    return None
  return fractions.Fraction(numeral.replace(",", ""))


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


def unit(text: str) -> tuple[str, fractions.Fraction]:
  """Returns the dimension and size of a unit such as km, m^2 or km/h."""
  kinds, size = [], fractions.Fraction(1)
  for i, factor in enumerate(_RATIO_UNIT.split(_OF.sub("", text))):
    match = _UNIT.fullmatch(factor)
    names = (match["name"], match["name"].removesuffix("s")) if match else ()
    name = next((name for name in names if name in _UNITS), None)
    if match is None or name is None:
      return "", fractions.Fraction(1)
    power = int(
      match["power"] or ((match["square"] and 2) or (match["cubic"] and 3) or 1)
    )
    kind, its_size = _UNITS[name]
    kinds.append(kind if power == 1 else f"{kind}^{power}")
    size *= its_size ** (-power if i else power)
  return "/".join(kinds), size


def _sum(text: str) -> Quantity | None:
  """Adds two quantities of one dimension, such as 5 feet 6 inches."""
  match = _SUM.fullmatch(text) if len(text) <= _MAX_SUM else None
  terms = [parse(term) for term in match.groups()] if match else []
  if len(terms) < 2 or terms[0] is None or terms[1] is None:
    return None
  first, second = terms[0], terms[1]
  if not first.kind or first.kind != second.kind or first.size <= second.size:
    return None
  value = first.value + second.value * second.size / first.size
  return Quantity(value, first.kind, first.size)


def _is_unit(text: str, *, is_one: bool) -> bool:
  """Returns whether the text after a number is a unit that can be dropped.

  That is a listed unit, or words with a listed unit or a plural among them. One
  letter, or a noun that is not listed, must be separated from the number: 2xyz
  is a product.
  """
  words = _WORD.findall(text)
  if not words:
    return True
  if words == ["a"] or _NOT_UNITS.search(text):
    return False
  listed = [_listed(word) for word in words]
  if text[0].isalpha() and (not listed[0] or len(words[0]) == 1):
    return False
  if any(len(word) < 3 and not _listed(word) for word in words):
    return False
  plural = any(len(word) > 3 and word.endswith("s") for word in words)
  return any(listed) or plural or is_one


def _listed(word: str) -> bool:
  return any(
    name in _UNITS or name in _PLAIN_UNITS
    for name in (word, word.removesuffix("s"))
  )


def _rounds_to(decimal: Quantity, quotient: Quantity) -> bool:
  """Returns whether a long decimal is a rounded or truncated quotient.

  The quotient must have no finite decimal expansion: otherwise the decimal
  could have been exact.
  """
  rest = quotient.value.denominator
  for prime in (2, 5):
    while rest % prime == 0:
      rest //= prime
  if not decimal.step or not quotient.is_quotient or rest == 1:
    return False
  if (decimal.value < 0) != (quotient.value < 0):
    return False
  excess = abs(decimal.value) - abs(quotient.value)
  return -decimal.step < excess <= decimal.step / 2
