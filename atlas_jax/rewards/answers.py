# SPDX-License-Identifier: Apache-2.0
"""Extracts final answers from texts."""

import re

from atlas_jax.rewards import plain, quantities

# The exponent of a power is part of the number.
_POWER = re.compile(r"\s*\^\s*(?:\{-?\d{1,3}\}|-?\d{1,3})")

# Escaped braces do not nest.
_BRACE = re.compile(
  r"(?P<box>\\f?box(?:ed)?\s*\{)|\\[{}]|(?P<open>\{)|(?P<close>\})"
)
# The answer is matched by a lookahead, so the last of two declarations on one
# line is found.
_DECLARATION = re.compile(
  r"(?:\b(?:answer|correct (?:option|choice))\b[\s*]*(?:is\b|:|=)[\s*:]*"
  r"|####\s*)(?=(\S[^\n]*))",
  re.IGNORECASE,
)
_CLAUSE_END = re.compile(
  r"[.!](?=\s|\*|$)|;|,?\s(?:because|since|so|which)\b", re.IGNORECASE
)
# Words to skip between "the answer is" and the answer.
_FILLER = re.compile(
  r"(?:(?:therefore|thus|then|now|simply|just|equal to)\b[,:]?\s*)+",
  re.IGNORECASE,
)
# Matches the innermost pair: an unclosed tag does not swallow the next one.
_BLOCK = re.compile(r"<(solution|answer)>((?:(?!<\1>).)*?)</\1>", re.DOTALL)


def extract(text: str) -> str | None:
  """Returns the declared answer, else the last number, else None."""
  return declared(text) or _last_number(text)


def declared(text: str) -> str | None:
  r"""Returns the answer that a text declares as final.

  The first of these that is present:
    1. the last non-empty \boxed{...}, with nested braces;
    2. the last <solution> or <answer> block: its last "answer is ..."
       statement, else its last line;
    3. the last "answer is ...", "answer: ...", "correct choice is ..." or
       "#### ...", up to the end of its sentence.

  Args:
    text: a student's full answer, or a reference solution.

  Returns:
    The answer as written, or None if no answer is declared.
  """
  return _boxed(text) or _solution(text) or _stated(text)


def of_reference(text: str) -> str:
  """Returns the answer that a reference declares, else the whole text."""
  return declared(text) or text


def _boxed(text: str) -> str | None:
  """Returns the contents of the last box that is closed and non-empty."""
  opened: list[int | None] = []  # Start of each box; None for other braces.
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
  """Returns the answer in the last closed solution block."""
  blocks = _BLOCK.findall(text)
  inner = blocks[-1][1].strip() if blocks else ""
  return _stated(inner) or (inner.splitlines()[-1].strip() if inner else None)


def _stated(text: str) -> str | None:
  """Returns the answer of the last "answer is ..." statement."""
  statements = _DECLARATION.findall(text)
  if not statements:
    return None
  answer = _CLAUSE_END.split(statements[-1], maxsplit=1)[0]
  if filler := _FILLER.match(answer):
    answer = answer[filler.end() :]
  return answer.strip(" *") or None


def _last_number(text: str) -> str | None:
  """Returns the last number as written, with exponent, divisor or percent."""
  bare, last, end = plain.text(text), None, 0
  for match in quantities.NUMBER.finditer(bare):
    if match.start() >= end:
      end = match.end()
      for pattern in (_POWER, quantities.DIVISOR, quantities.PERCENT):
        if tail := pattern.match(bare, match.end()):
          end = tail.end()
          break
      last = bare[match.start() : end]
  return last
