# SPDX-License-Identifier: Apache-2.0
r"""Finds the final answer in a text, and compares answers exactly.

Numbers are compared as fractions, never as rounded floats: 1,500 is 1500, 1/2
is 0.5, 50% is 50% and 0.5 (not 50), and 0.001 is not 0.004.
"""

from collections.abc import Iterator
import fractions
import re

_NUMERAL = (
  r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)"
  r"(?:e[-+]?\d{1,2}(?!\w))?"
)
# A minus after a word or a bracket is a subtraction, not a sign.
_NUMBER = re.compile(
  rf"(?:(?<![\w.)])[-+])?(?<!\d)(?<!\d\.){_NUMERAL}", re.IGNORECASE
)
_DIVISOR = re.compile(rf"\s*/\s*({_NUMERAL})", re.IGNORECASE)
_PERCENT = re.compile(r"\s*(?:%|percent\b|per cent\b)", re.IGNORECASE)
_QUANTITY = re.compile(
  rf"(?P<sign>[-+]?)\s*(?:(?P<whole>\d+)\s+(?=\d+\s*/))?"
  rf"(?P<top>{_NUMERAL})(?:\s*/\s*(?P<bottom>{_NUMERAL}))?"
  rf"(?:(?P<percent>{_PERCENT.pattern})|(?P<unit>\s*[a-z][a-z/^ ]*[23]?))?"
)
# These change a number's value, so they are not units to be dropped.
_NOT_UNITS = re.compile(
  r"\b(?:hundred|thousand|million|billion|trillion|dozen|half|and|or|to|not|pi|"
  r"sqrt|e|i|n|x|y|z)\b"
)
# int() refuses longer numerals, and no answer is that long.
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

_SUBSTITUTIONS = (
  (re.compile(r"\u2212"), "-"),
  (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r" \1/\2"),
  (re.compile(r"\\[dt]?frac\s*(\d)\s*(\d)"), r" \1/\2"),
  (re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}"), r"\1"),
  (re.compile(r"\{,\}"), ","),
  (re.compile(r"\\%"), "%"),
  # Degrees, dollars, euros, pounds and markup: units and wrappers.
  (re.compile(r"\^?\{?\\circ\}?|[$\u20ac\u00a3\u00b0`]|\*\*"), ""),
  (re.compile(r"\\(?:left|right)\b|\\[()\[\],;! $]"), ""),
)

# An escaped brace is neither opening nor closing.
_BRACE = re.compile(r"(?P<box>\\boxed\s*\{)|\\[{}]|(?P<open>\{)|(?P<close>\})")
# The answer is a lookahead, so that of two on one line the last one is found.
_DECLARATION = re.compile(
  r"(?:\banswer\b[\s*]*(?:is\b|:|=)[\s*:]*|####\s*)(?=(\S[^\n]*))",
  re.IGNORECASE,
)
_CLAUSE_END = re.compile(
  r"[.!](?=\s|\*|$)|;|,?\s(?:because|since|so|which)\b", re.IGNORECASE
)
_GIVEAWAY = re.compile(
  r"(?:\b(?:is|equals)|\banswer\s*:?|=|\\boxed\s*\{|<solution>)[\s*:(]*$"
)
_GIVEAWAY_CHARACTERS = 40


def extract(text: str) -> str | None:
  """Finds the final answer: a declared one, else the last number, else None."""
  return declared(text) or _last_number(text)


def declared(text: str) -> str | None:
  r"""Finds the answer that a text declares to be its final one.

  In this order: the last non-empty \boxed{...}, braces nesting; the last
  <solution> block, of which a closing statement or else the last line counts;
  the last "answer is ...", "answer: ..." or "#### ...", up to the end of its
  sentence.

  Args:
    text: a student's whole answer, or a reference solution.

  Returns:
    The answer as written, or None where nothing is declared.
  """
  return _boxed(text) or _solution(text) or _stated(text)


def equal(a: str, b: str) -> bool:
  """Tells whether two answers are the same.

  Both are read as numbers where both can be: units, currency, LaTeX wrappers,
  thousands separators and a trailing period are dropped, and number words up
  to ninety-nine are understood. Otherwise their texts are compared without
  case and spaces. Of an equation only the part after the last `=` counts. An
  empty answer equals nothing.
  """
  a_text, b_text = _right_side(a), _right_side(b)
  a_value, b_value = _value(a_text), _value(b_text)
  if a_value is not None and b_value is not None:
    return a_value == b_value
  a_letters, b_letters = "".join(a_text.split()), "".join(b_text.split())
  return bool(a_letters) and a_letters == b_letters


def leaks(teaching: str, question: str, answer: str) -> bool:
  r"""Tells whether a teaching gives the final answer away.

  It does where the answer, as a number in any notation or as a whole word,
  stands in the teaching and not in the question. An answer that the question
  itself contains is given away only where it is announced: "answer is X",
  "is X", "= X", \boxed{X} or <solution>X.

  Args:
    teaching: what the student will read.
    question: what the student would read anyway.
    answer: the final answer alone, without a solution around it.
  """
  given = _occurrences(teaching, answer)
  if not _occurrences(question, answer):
    return bool(given)
  return any(_GIVEAWAY.search(before.casefold()) for before in given)


def _boxed(text: str) -> str | None:
  """Returns the contents of the closed, non-empty box that opens last."""
  opened: list[int | None] = []  # Where each box began; None for other braces.
  found_at, found = -1, None
  for match in _BRACE.finditer(text):
    if match.lastgroup in ("box", "open"):
      opened.append(match.end() if match["box"] else None)
    elif match.lastgroup == "close" and opened:
      start = opened.pop()
      inner = text[start : match.start()].strip()
      if start is not None and start > found_at and inner:
        found_at, found = start, inner
  return found


def _solution(text: str) -> str | None:
  """Returns what the last closed solution block declares."""
  end = text.rfind("</solution>")
  start = text.rfind("<solution>", 0, max(end, 0))
  if start < 0:
    return None
  inner = text[start + len("<solution>") : end].strip()
  return _stated(inner) or (inner.splitlines()[-1].strip() if inner else None)


def _stated(text: str) -> str | None:
  """Returns the answer of the last "answer is ...", without its sentence."""
  statements = _DECLARATION.findall(text)
  if not statements:
    return None
  answer = _CLAUSE_END.split(statements[-1], maxsplit=1)[0]
  return answer.strip(" *") or None


def _last_number(text: str) -> str | None:
  """Returns the last number as written, with its divisor or percent sign."""
  plain, last, end = _plain(text), None, 0
  for match in _NUMBER.finditer(plain):
    if match.start() >= end:
      tail = _DIVISOR.match(plain, match.end())
      tail = tail or _PERCENT.match(plain, match.end())
      end = tail.end() if tail else match.end()
      last = plain[match.start() : end]
  return last


def _plain(text: str) -> str:
  """Takes LaTeX, currency and emphasis away."""
  for pattern, replacement in _SUBSTITUTIONS:
    text = pattern.sub(replacement, text)
  return text


def _normalized(text: str) -> str:
  """Returns plain lower-case text with number words as digits."""

  def digits(match: re.Match[str]) -> str:
    return str(sum(_WORDS[word] for word in match.groups() if word))

  return _NUMBER_WORD.sub(digits, _plain(text).casefold())


def _right_side(answer: str) -> str:
  """Normalizes an answer and drops what stands before its last `=`."""
  return _trimmed(_normalized(answer).rsplit("=", maxsplit=1)[-1])


def _trimmed(text: str) -> str:
  """Takes the punctuation around an answer away, but not the point of .5."""
  return text.rstrip(" \t\r\n.,;:!*").lstrip(" \t\r\n:*")


def _value(normalized: str) -> fractions.Fraction | None:
  """Reads a whole normalized answer as a number, if it is one."""
  match = _QUANTITY.fullmatch(normalized)
  if match is None or _NOT_UNITS.search(match["unit"] or ""):
    return None
  value, divisor = _fraction(match["top"]), _fraction(match["bottom"] or "1")
  whole = _fraction(match["whole"] or "0")
  if value is None or not divisor or whole is None:
    return None
  value = whole + value / divisor
  if match["percent"]:
    value /= 100
  return -value if match["sign"] == "-" else value


def _fraction(numeral: str) -> fractions.Fraction | None:
  """Reads one numeral exactly."""
  if len(numeral) > _MAX_DIGITS:
    return None
  return fractions.Fraction(numeral.replace(",", ""))


def _numbers(text: str) -> Iterator[tuple[int, fractions.Fraction]]:
  """Yields every number in normalized text, after where it starts.

  A quotient also yields its value, and a percentage its fraction.
  """
  for match in _NUMBER.finditer(text):
    value = _fraction(match[0])
    if value is None:
      continue
    yield match.start(), value
    if _PERCENT.match(text, match.end()):
      yield match.start(), value / 100
    divided = _DIVISOR.match(text, match.end())
    divisor = _fraction(divided[1]) if divided else None
    if divisor:
      yield match.start(), value / divisor


def _occurrences(text: str, answer: str) -> list[str]:
  """Lists the text just before each place where the answer stands."""
  right_side = _right_side(answer)
  value = _value(right_side)
  if value is not None:
    text = _normalized(text)
    wanted = {value, value * 100} if _PERCENT.search(right_side) else {value}
    starts = [start for start, number in _numbers(text) if number in wanted]
  elif right_side:
    # A one-letter answer keeps its case: "A" is a choice, "a" an article.
    if len(right_side) == 1:
      text, right_side = _plain(text), _trimmed(_plain(answer))
    else:
      text = _normalized(text)
    whole_word = rf"(?<!\w){re.escape(right_side)}(?!\w)"
    starts = [match.start() for match in re.finditer(whole_word, text)]
  else:
    starts = []
  return [text[max(0, at - _GIVEAWAY_CHARACTERS) : at] for at in starts]
