# SPDX-License-Identifier: Apache-2.0
r"""Compares answers by rules: numbers, tuples, sets, choices, times or text.

Numbers are fractions, never rounded floats: 1,500 equals 1500, 1/2 equals 0.5,
50% equals 0.5, and 0.001 differs from 0.004. `grading` asks math-verify about
the pairs for which these rules have no verdict.
"""

from collections.abc import Hashable
import fractions
import re

from atlas_jax.rewards import plain, quantities

# Only the last characters of longer answers are compared.
_MAX_LENGTH = 10_000
_PREFIX = re.compile(
  r"(?:approximately|approx\.?|about|roughly|exactly)\s+"
  r"|^[a-z ]{2,40}:\s+(?=[-\d])"
)
# A dollar sign without its partner is not LaTeX.
_DOLLARS = re.compile(
  rf"\\?\$\s*(\d[\d,]*(?:\.\d+)?)(?![.,]?\d|\s*{quantities.SCALE})"
)
_NEGATIVE = re.compile(r"(?:negative|minus)\s+(?=[\d.])")
_MEMBER = re.compile(r"[a-z]\s*(?:\\in\b|\u2208)\s*")
# What follows rules out or explains the answer: "12 apples, not 13".
_ASIDE = re.compile(
  r"(?<=\w),?\s+(?:not|instead of|rather than|which|because|since)\s.*",
  re.DOTALL,
)
_EXCLAMATION = re.compile(r"(?:(?<![\w)])|(?<=[^\W\d]{2}))!{1,9}\s*$")
_MAX_EXPRESSION = 500
_NO_UNIT = quantities.unit("")
# Lists nested deeper than this are compared as text.
_MAX_DEPTH = 8
_COMMAND = re.compile(r"\\(?:begin|end)\s*\{\w+\}|\\[a-zA-Z]+")
# Also not an expression: one that lacks its last operand.
_PROSE = re.compile(r"[a-zA-Z]{4}|\bnan\b|[-+*/^=<>_]\s*$", re.IGNORECASE)
_EXPRESSION = re.compile(
  r"\\[a-zA-Z]|[-+*/^_=<>|!(\[{]|\d\s*[a-zA-Z]|\b[a-zA-Z]{1,3}\b"
)
_EQUALS = re.compile(r"(?<![<>!=])=(?!=)")
_OPERATOR = re.compile(r"[-+*/^<>|]|\d[a-z(]")
_NAME = re.compile(r"\s*([a-z])\s*=[^,]*")
_RATIO = re.compile(r"\b(\d+)\s*(?::|\bto\b)\s*(?=\d)")
_CHOICE = re.compile(
  r"(?:(?:option|choice)\s+)?(?P<open>\()?(?P<letter>[a-j])"
  r"(?P<close>(?(open)\)[.:]?|[).:]))?(?P<rest>\s+\S.*)?",
  re.DOTALL,
)
_VERDICT = re.compile(r"(yes|no|true|false)\b(?:[,.;:!].*)?", re.DOTALL)
_CLOCK = re.compile(
  r"(?P<hour>\d{1,2})(?::(?P<minute>[0-5]\d))?\s*(?P<half>[ap])\.?\s*m\.?"
  r"|(?P<bare_hour>\d{1,2}):(?P<bare_minute>[0-5]\d)"
)
_HALF_DAY = 12 * 60
_GROUP = re.compile(r"\{(\w)\}")
_AND = re.compile(r"\s*(?:\band\b|\bor\b|;)\s*")
_PLUS_MINUS = re.compile(r"\\pm(?![a-zA-Z])\s*")


def equal(answer: str, reference: str) -> bool:
  """Returns whether an answer equals the reference by these rules.

  If both parse as numbers, their values are compared: currency, LaTeX wrappers,
  thousands separators and a trailing period are dropped. Units are dropped too,
  unless both sides have a known one: 1 km equals 1000 m, 5 m differs from 5 cm.
  A decimal of at least 8 digits equals a quotient that rounds to it. If the
  reference is a percentage, the answer may omit the percent sign.

  Tuples and intervals are compared by brackets and members, sets and lists by
  members in any order, choices by their letters, times by the minute, and other
  answers by text, ignoring case and whitespace. Of an equation, a left side
  that only names the result is dropped. An empty answer and NaN equal nothing.
  """
  # Single spaces: patterns search long runs of them in quadratic time.
  answer, reference = (
    " ".join(text[-_MAX_LENGTH:].split()) for text in (answer, reference)
  )
  a_text, b_text = right_side(answer), right_side(reference)
  if not a_text or not b_text or "nan" in (a_text, b_text):
    return False
  a_name, b_name = (
    _NAME.fullmatch(trimmed(quantities.normalized(text)))
    for text in (answer, reference)
  )
  if a_name and b_name and a_name[1] != b_name[1]:
    return False
  a_number, b_number = quantities.parse(a_text), quantities.parse(b_text)
  if a_number is not None and b_number is not None:
    return quantities.same(a_number, b_number)
  a_letter, b_letter = _letter(a_text), _letter(b_text)
  if a_letter and b_letter and 1 in (len(a_letter), len(b_letter)):
    return a_letter[0] == b_letter[0]
  return _same_time(a_text, b_text) or _key(a_text) == _key(b_text)


def needs_algebra(answer: str, reference: str) -> bool:
  """Returns whether `equal` has no verdict on two answers: it takes algebra.

  At least one is an expression, the other one a number or an expression.
  """
  if max(len(answer), len(reference)) > _MAX_EXPRESSION:
    return False
  kinds = {_math_kind(answer), _math_kind(reference)}
  units = {_text_unit(text) for text in (answer, reference)} - {_NO_UNIT}
  return "" not in kinds and "expression" in kinds and len(units) < 2


def is_number(text: str) -> bool:
  """Returns whether an answer is a number, with or without a unit."""
  return quantities.parse(right_side(text)) is not None


def _math_kind(text: str) -> str:
  """Returns "number", "expression", or "" for others, such as prose."""
  if quantities.PERCENT.search(plain.text(text)) or _times(right_side(text))[0]:
    return ""
  if is_number(text):
    return "number"
  latex = plain.latex(text)
  prose = _PROSE.search(_COMMAND.sub(" ", latex))
  return "expression" if _EXPRESSION.search(latex) and not prose else ""


def _text_unit(text: str) -> tuple[str, fractions.Fraction]:
  r"""Returns the unit after an expression: 2\sqrt{3}\text{ cm}."""
  unit = plain.UNIT.search(text)
  return quantities.unit(plain.text(unit[0]).casefold()) if unit else _NO_UNIT


def right_side(answer: str) -> str:
  """Normalizes an answer and drops names of the result, as in `x = 5`."""
  answer = answer[-_MAX_LENGTH:]
  if answer.count("$") == 1:
    answer = _DOLLARS.sub(r"\1 dollars", answer)
  text = _ASIDE.sub("", trimmed(quantities.normalized(answer)), count=1)
  text = plus_minus(text)
  if sum("=" in part for part in split(text)) < 2:
    text = without_name(text)  # Of several equations, `_key` splits each.
  text = _PREFIX.sub("", _MEMBER.sub("", trimmed(text), count=1), count=1)
  text = trimmed(_NEGATIVE.sub("-", text) if _NEGATIVE.match(text) else text)
  return quantities.digits_of_words(_RATIO.sub(r"\1:", text))


def plus_minus(text: str) -> str:
  r"""Replaces an expression with \pm by the list of its two values."""
  if not _PLUS_MINUS.search(text) or len(split(text)) > 1:
    return text
  plus, minus = (_PLUS_MINUS.sub(sign, text) for sign in ("+", "-"))
  return f"{plus.removeprefix('+')}, {without_name(minus)}"


def without_name(text: str) -> str:
  """Drops the left sides of an equation if they only name its right side.

  These are names, words and sums of numbers: `x = 5`, `f(x) = 2x` and
  `3 + 4 = 7`, but not `x + y = 7` or `2x = 7`.
  """
  *sides, right = _EQUALS.split(text)
  is_named = all(
    not _OPERATOR.search(side) or not re.search("[a-zA-Z]", side)
    for side in sides
  )
  return right if is_named else text


def trimmed(text: str) -> str:
  """Strips punctuation around an answer, but keeps .5 and the factorial 5!."""
  text = _EXCLAMATION.sub("", text)
  return text.rstrip(" \t\r\n.,;:*\"'").lstrip(" \t\r\n:*\"'")


def _letter(text: str) -> str:
  """Returns a choice's letter, with a star if the choice's text follows it."""
  match = _CHOICE.fullmatch(text)
  if match is None or (match["rest"] and not match["close"]):
    return ""
  return match["letter"] + ("*" if match["rest"] else "")


def _same_time(a: str, b: str) -> bool:
  """Returns whether two times of day are equal, at least one with am or pm."""
  (a_times, a_half), (b_times, b_half) = _times(a), _times(b)
  return (a_half or b_half) and bool(a_times & b_times)


def _times(text: str) -> tuple[set[int], bool]:
  """Returns the minutes of the day that a time may mean, and if it has am."""
  text = {"noon": "12 pm", "midnight": "12 am"}.get(text, text)
  match = _CLOCK.fullmatch(text)
  if match is None:
    return set(), False
  if match["half"]:
    hour = int(match["hour"]) % 12 + 12 * (match["half"] == "p")
    return {hour * 60 + int(match["minute"] or 0)}, True
  hour, minute = int(match["bare_hour"]), int(match["bare_minute"])
  if hour > 12:
    return {hour * 60 + minute}, False
  start = hour % 12 * 60 + minute
  return {start, start + _HALF_DAY}, False


def parts(text: str) -> tuple[str, list[str]]:
  """Splits an answer into members.

  Returns:
    The brackets and the members in order if the answer is a tuple or an
    interval; otherwise no brackets and the members of a set, a list or a union,
    whose order has no meaning. Any other answer is its only member. A list of
    different names' values, x = 1, y = 2, is the tuple of the values.
  """
  text = text.strip()
  if "\\cup" in text:
    return "", text.split("\\cup")
  if _is_bracketed(text):
    members = split(text[1:-1])
    if text[0] == "{":
      return "", members
    if len(members) > 1:
      return text[0] + text[-1], members
  members = split(text)
  names = [match and match[1] for match in map(_NAME.fullmatch, members)]
  if len(members) > 1 and all(names) and len(set(names)) == len(names):
    named = sorted(zip(names, members, strict=True))
    return "()", [without_name(member) for _, member in named]
  return "", members


def _is_bracketed(text: str) -> bool:
  """Returns whether a pair of brackets surrounds the whole text."""
  if text[:1] not in ("(", "[", "{") or text[-1:] not in (")", "]", "}"):
    return False
  depth = 0
  for i, character in enumerate(text):
    depth += (character in "([{") - (character in ")]}")
    if depth == 0:
      return i == len(text) - 1
  return False


def _key(text: str, depth: int = 0) -> Hashable:
  """Returns a key that two normalized answers share if they are equal."""
  verdict = _VERDICT.fullmatch(text)
  if verdict:
    return verdict[1]
  brackets, members = parts(text)
  if brackets:
    return (brackets, *(_member(member, depth) for member in members))
  if members == [text]:
    return _member(text, depth)
  found = frozenset(_member(member, depth) for member in members)
  return next(iter(found)) if len(found) == 1 else found


def _member(text: str, depth: int) -> Hashable:
  """Parses a number, a nested list, else returns the text."""
  text = right_side(text)
  number = quantities.parse(text)
  if number is not None:
    return number.value * number.size
  if depth > _MAX_DEPTH or parts(text) == ("", [text]):
    return _letters(text)
  return _key(text, depth + 1)


def _letters(text: str) -> str:
  """Removes whitespace, braces around one character, and implied `*`."""
  text = _GROUP.sub(r"\1", "".join(text.split()))
  return re.sub(r"(?<=[\d)])\*(?=[a-z(])", "", text)


def split(text: str) -> list[str]:
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
