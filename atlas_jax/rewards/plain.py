# SPDX-License-Identifier: Apache-2.0
r"""Converts answers to plain text: removes LaTeX, currency and emphasis.

The result can be searched for numbers: \frac{1}{2} becomes 1/2, 3 \times 10^5
becomes 3e5, and thin spaces within numbers are removed.
"""

import re

_FRACTION = re.compile(
  r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))"
)
_ROOT = re.compile(r"\\sqrt\s*(?:\{([^{}]*)\}|(\w))")
_ATOM = re.compile(r"-?[\w.,]*(?:\([^()]*\))?")
_REPEATING = re.compile(r"(?<!\d)(\d{0,9})\.(\d{0,9})\\overline\{(\d{1,9})\}")
_VULGAR = {
  **{"\u00bd": "1/2", "\u2153": "1/3", "\u2154": "2/3", "\u00bc": "1/4"},
  **{"\u00be": "3/4", "\u2155": "1/5", "\u2156": "2/5", "\u2157": "3/5"},
  **{"\u2158": "4/5", "\u2159": "1/6", "\u215b": "1/8"},
}
_CHARACTERS = str.maketrans(
  {
    **{character: f" {quotient}" for character, quotient in _VULGAR.items()},
    **{"\u2212": "-", "\u2013": "-", "\u00d7": "*", "\u00b7": "*"},
    **{"\u00b2": "^2", "\u00b3": "^3", "\u2248": "=", "\u03c0": "pi"},
    **{"\u221e": "inf", "\u222a": "\\cup ", "\u2205": "{}"},
    **{"\u221a": "\\sqrt ", "\u00b1": "\\pm "},
    **{"\u2264": "<=", "\u2265": ">=", "\u2260": "!="},
    **{"\u00a0": " ", "\u2009": "", "\u202f": ""},
  }
)
_SUBSTITUTIONS = (
  (
    re.compile(
      r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|mbox|operatorname)"
      r"\s*\{([^{}]*)\}"
    ),
    r"\1",
  ),
  (re.compile(r"\{,\}"), ","),
  (re.compile(r"\\%"), "%"),
  # Degrees, dollars, euros, pounds and markup: units and wrappers.
  (
    re.compile(
      r"(?:\^?\{?\\circ\}?|\u00b0)(?:\s*[CF](?![a-zA-Z]))?"
      r"|\\degree(?![a-zA-Z])|\\?[$\u20ac\u00a3]|`|\*\*"
    ),
    "",
  ),
  (re.compile(r"\\(?:left|right|big|Big|displaystyle)(?![a-zA-Z])"), ""),
  (re.compile(r"(?<!\\)\\(?:[;: ]|q?quad(?![a-zA-Z]))|~"), " "),
  (re.compile(r"(?<!\\)\\[()\[\],!]"), ""),
  (re.compile(r"\\([{}])"), r"\1"),
  (re.compile(r"\\(?:times|cdot|ast)(?![a-zA-Z])"), "*"),
  (re.compile(r"\\approx(?![a-zA-Z])"), "="),
  (re.compile(r"\\(?:leq?|leqslant)(?![a-zA-Z])"), "<="),
  (re.compile(r"\\(?:geq?|geqslant)(?![a-zA-Z])"), ">="),
  (re.compile(r"\\neq?(?![a-zA-Z])"), "!="),
  (re.compile(r"\+?\\infty(?![a-zA-Z])"), "inf"),
  (re.compile(r"\\(?:emptyset|varnothing)(?![a-zA-Z])"), "{}"),
  (re.compile(r"\\pi(?![a-zA-Z])"), "pi"),
  # Powers of ten, with or without a factor before them.
  (
    re.compile(r"(?<=\d)\s*[*x]\s*10\s*\^\s*\{?([-+]?\d{1,3})\}?(?!\d)"),
    r"e\1",
  ),
  (re.compile(r"(?<![\w.^])10\s*\^\s*\{?([-+]?\d{1,3})\}?(?!\d)"), r"1e\1"),
)
# What `latex` replaces, so that math-verify can parse the result.
_LATEX_CHARACTERS = str.maketrans(
  {
    **{character: f" {quotient}" for character, quotient in _VULGAR.items()},
    **{"\u2212": "-", "\u2013": "-", "\u00d7": "*", "\u00b7": "*"},
    **{"\u00b2": "^2", "\u00b3": "^3", "\u2248": "=", "\u03c0": "\\pi "},
    **{"\u221e": "\\infty ", "\u222a": "\\cup ", "\u2205": "\\emptyset "},
    **{"\u00b1": "\\pm ", "\u2264": "\\le ", "\u2265": "\\ge "},
    **{"\u2260": "\\ne ", "\u2208": "\\in "},
    **{"\u00a0": " ", "\u2009": "", "\u202f": ""},
  }
)
# A unit after an expression, with its power.
UNIT = re.compile(
  r"\\(?:text|mathrm|mbox)\s*\{\s*(?!and\b|or\b)"
  r"[a-zA-Z]+(?:[/. ]+[a-zA-Z]+){0,3}"
  r"\s*\}(?:\^\{?[23]\}?)?(?=[.\s$]*$)"
)
_LATEX_SUBSTITUTIONS = (
  (UNIT, ""),
  # Degrees of a function's argument, which are dropped elsewhere.
  (
    re.compile(r"\\(sin|cos|tan)\s*\(?(\d+)\s*\^\s*\{?\\circ\}?\)?"),
    r"\\\1(\2\\pi/180)",
  ),
  *_SUBSTITUTIONS[:8],
  # Set-builder notation.
  (
    re.compile(
      r"\{\s*[a-z](?:\s*\\in\s*\\mathbb\{R\})?\s*(?:\||:|\\mid)(.*)\}"
    ),
    r"\1",
  ),
  (re.compile(r"(?:\u221a|\\?\bsqrt)\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
  (re.compile(r"\u221a\s*(\d+|\w)"), r"\\sqrt{\1}"),
  (re.compile(r"\\sqrt\s*(\w)"), r"\\sqrt{\1}"),
  (
    re.compile(r"(?<![\\a-zA-Z])(pi|sin|cos|tan|log|ln|exp|sqrt)(?![a-zA-Z])"),
    r"\\\1 ",
  ),
)
# Fractions and roots nested deeper than this are not converted.
_MAX_DEPTH = 8


def text(answer: str) -> str:
  """Removes LaTeX, currency and emphasis."""
  answer = _REPEATING.sub(_fraction, answer.translate(_CHARACTERS))
  for pattern, replacement in _SUBSTITUTIONS:
    answer = pattern.sub(replacement, answer)
  # The patterns match operands without braces, so each pass converts the
  # innermost fractions and roots.
  for _ in range(_MAX_DEPTH):
    opened = _FRACTION.sub(_quotient, _ROOT.sub(_root, answer))
    if opened == answer:
      break
    answer = opened
  return answer


def latex(answer: str) -> str:
  """Removes delimiters, spacing, units and markup, and keeps other LaTeX."""
  answer = _REPEATING.sub(_fraction, answer.translate(_LATEX_CHARACTERS))
  for pattern, replacement in _LATEX_SUBSTITUTIONS:
    answer = pattern.sub(replacement, answer)
  return answer.strip(" \t\r\n.,;:")


def _fraction(decimal: re.Match[str]) -> str:
  r"""Writes the repeating decimal 0.1\overline{6} as the quotient 15/90."""
  start, period = decimal[1] + decimal[2], decimal[3]
  top = int(start + period) - int(start or 0)
  return f" {top}/{'9' * len(period)}{'0' * len(decimal[2])}"


def _quotient(match: re.Match[str]) -> str:
  top, bottom = (
    _operand(match[i] if match[i] is not None else match[i + 1]) for i in (1, 3)
  )
  # The space keeps a mixed number apart: 1\frac{1}{2} becomes 1 1/2.
  return f" {top}/{bottom}"


def _operand(text: str) -> str:
  """Parenthesizes an operand unless it is a single term."""
  text = text.strip()
  return text if _ATOM.fullmatch(text) else f"({text})"


def _root(match: re.Match[str]) -> str:
  return f"sqrt({match[1] if match[1] is not None else match[2]})"
