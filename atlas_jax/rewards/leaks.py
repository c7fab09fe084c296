# SPDX-License-Identifier: Apache-2.0
r"""Detects teachings that reveal the final answer.

A number leaks if it is
  1. distinctive and not in the question. Integers up to 20, 1/2 and constants
     of a unit that is mentioned (60 for minutes) are incidental instead;
  2. announced: "the answer is 3", "= 3", "you get 3", "3 apples are left", a
     box, the last line, or "3 + 4 = 7" if the question contains 7 but not 3.
     Numbers restated from the question, general facts ("an hour has 60
     minutes"), questions and conditions announce nothing;
  3. carried to the last step: an expression with the answer's value and a new
     operand that is announced or followed by no other step.

For a question with the numbers 4, 3 and 5 whose answer is 17:

  multiply 4 by 3, then add 5   only numbers of the question: no leak
  4 * 3 = 12                    12 is not the answer: no leak
  so compute 12 + 5             12 is new, the value is 17: leak

A text leaks wherever it occurs, but only if announced where the question
contains it; "yes", "no", "true" and "false" always must be announced. In a
multiple choice, the letter and the text of the right option leak.
"""

import fractions
import itertools
import re

from atlas_jax.rewards import (
  announcements,
  compare,
  expressions,
  plain,
  quantities,
)

_MAX_INCIDENTAL = 20
_HALF = fractions.Fraction(1, 2)
# Numbers that are common knowledge where a word occurs.
_CONSTANTS = (
  (r"\b(?:minute|second|hour)", (60, 3600)),
  (r"\b(?:hour|day)", (24,)),
  (r"\b(?:week|day)", (7,)),
  (r"\b(?:year|month)", (12, 52, 365)),
  (r"\b(?:dozen|inch|foot|feet)", (12,)),
  (r"\b(?:yard|triang)", (3,)),
  (r"\b(?:angle|degree|circ)|triang", (90, 180, 360)),
  (r"%|\b(?:percent|cent|cm\b)", (100,)),
  (r"\b(?:k[gm]|m[lm])\b|\b(?:kilo|milli)", (1000,)),
)
_VERDICTS = ("yes", "no", "true", "false")
_OPERATION = re.compile(
  r"\b(?:add|subtract|multiply|divide|halve|double|then|convert|remove)\b"
)
_EQUALS = re.compile(r"\s*(?:=|is|equals|makes)\s*")
_OPTION = re.compile(
  r"(?<!\w)\(?([A-J])[.):]\s*(.*?)(?=\s*(?:\(?[B-J][.):]\s|\n|$))"
)


def reveals_answer(teaching: str, question: str, answer: str) -> bool:
  """Returns whether a teaching reveals the final answer.

  Args:
    teaching: text shown to the student.
    question: the question, which the student sees in any case.
    answer: the final answer alone, without a solution around it.
  """
  options = dict(_OPTION.findall(plain.text(question)))
  letter = re.fullmatch(
    r"\(?([A-J])(?:[.):]\s*.*)?", compare.trimmed(plain.text(answer))
  )
  if letter:
    right = {letter[1]}
  else:
    right = {
      key for key, text in options.items() if compare.equal(text, answer)
    }
  if any(_names(teaching, key, options) for key in right):
    return True
  texts = {options[key] for key in right & options.keys()}
  return any(
    _reveals(teaching, question, text)
    for text in (texts if letter else texts | {answer})
  )


def _reveals(teaching: str, question: str, answer: str) -> bool:
  """Returns whether a teaching reveals a number or a text."""
  side = compare.right_side(answer)
  number = quantities.parse(side)
  if number is None:
    shown, asked = (plain.text(t).casefold() for t in (teaching, question))
    return _text_leaks(shown, asked, side)
  wanted = {number.value}
  if quantities.PERCENT.search(side):
    wanted.add(number.value * 100)
  return _number_leaks(
    expressions.read(teaching), expressions.read(question), wanted
  )


def _number_leaks(
  text: str, question: str, wanted: set[fractions.Fraction]
) -> bool:
  """Applies the rules for numbers to texts that `expressions.read` returned."""
  given = _given(question)
  constants = {
    fractions.Fraction(n)
    for words, numbers in _CONSTANTS
    if re.search(words, f"{question} {text}")
    for n in numbers
  }
  is_given = not wanted.isdisjoint(given)
  is_distinctive = not is_given and not any(
    n in constants | {_HALF}
    or (n.denominator == 1 and abs(n) <= _MAX_INCIDENTAL)
    for n in wanted
  )
  found = [None, *expressions.find(text), None]
  for previous, each, following in zip(
    found, found[1:], found[2:], strict=False
  ):
    if wanted.isdisjoint((each.value, *each.operands)):
      continue
    is_expression = len(each.operands) > 1
    place = announcements.locate(
      text,
      each.start,
      each.end,
      question=question,
      given=is_given and not is_expression,
    )
    if not is_expression:
      leaked = is_distinctive or announcements.is_number_announced(place)
    elif each.value in wanted:
      announced = announcements.is_number_announced(place)
      leaked = (
        announced
        or not (following or place.is_hedged or _OPERATION.search(place.after))
      ) and not _is_setup(
        place.found, each, given, constants, announced=announced
      )
    else:
      leaked = is_distinctive or (
        not is_given
        and each.value in given
        and any(
          left.value == right.value
          and _EQUALS.fullmatch(text[left.end : right.start])
          for left, right in ((previous, each), (each, following))
          if left and right
        )
      )
    if leaked:
      return True
  return False


def _given(question: str) -> set[fractions.Fraction]:
  """Returns the numbers of a question, and both readings of percentages."""
  found = list(expressions.find(question))
  given = {n for each in found for n in each.operands}
  for quotient in re.findall(r"\d+/\d+", question):
    number = quantities.parse(quotient)
    given |= {number.value} if number else set()
  if "%" in question:
    given |= {n * 100 for n in given}
  return given


def _is_setup(
  text: str,
  expression: expressions.Expression,
  given: set[fractions.Fraction],
  constants: set[fractions.Fraction],
  *,
  announced: bool,
) -> bool:
  """Returns whether an expression only combines numbers of the question.

  Constants may be combined with them, and so may 2 as a factor or an exponent,
  1 as a summand unless announced, and the number of numbers as a divisor, for a
  mean.
  """
  operands = set(expression.operands)
  shared = given | constants
  if re.search(r"[*/^]", text):
    shared |= {fractions.Fraction(2)}
  elif not announced:
    shared |= {fractions.Fraction(1)}
  if "/" in text and len(given) > 2:
    shared |= {fractions.Fraction(len(given))}
  return bool(operands & given) and operands <= shared


def _text_leaks(text: str, question: str, answer: str) -> bool:
  """Returns whether a text or a list of numbers is revealed."""
  pattern = _pattern(answer)
  if not pattern:
    return False
  is_verdict = answer in _VERDICTS
  given = is_verdict or bool(re.search(pattern, question))
  return any(
    not given
    or announcements.is_text_announced(
      announcements.locate(
        text, match.start(), match.end(), question=question, given=given
      ),
      is_verdict=is_verdict,
    )
    for match in re.finditer(pattern, text)
  )


def _pattern(answer: str) -> str:
  """Returns a pattern of an answer; lists may be in any order."""
  members = re.split(r"\s*(?:,|;|\band\b)\s*", answer.strip("(){}[] "))
  if 1 < len(members) <= 4 and all(map(quantities.parse, members)):
    orders = [members] if answer[0] in "([" else itertools.permutations(members)
    between = r"\s*(?:,|;|and|or)\s*(?:[a-z]\s*=\s*)?"
    lists = "|".join(between.join(map(re.escape, order)) for order in orders)
    return rf"(?<![\w.])(?:{lists})(?!\w|\.\d)"
  tokens = map(re.escape, re.findall(r"\w+|[^\w\s]", answer))
  words = r"\s*".join(tokens)
  return rf"(?<!\w){words}(?!\w)" if words else ""


def _names(teaching: str, letter: str, options: dict[str, str]) -> bool:
  """Returns whether a sentence names the right option and no other one."""
  either = rf"(?:{letter}|{letter.lower()})"
  named = re.compile(
    rf"\b[Oo]ptions? \(?{letter}\b|\({either}\)|"
    rf"\b(?:[Aa]nswer|[Cc]hoice)(?: is)?:? \(?{either}\b|"
    r"\b(?:[Cc]hoose|[Pp]ick|[Ss]elect|[Mm]ark|[Gg]o with|[Ii]s) "
    rf"\(?{letter}\b|"
    rf"\b{letter} is (?:correct|right|the)\b|^{letter}$"
  )
  # "A" and "I" are words, too.
  other = re.compile(rf"\b(?!{letter})[B-HJ]\b|\((?!{letter})[AI]\)")
  sentences = re.split(r"(?<=[.!?;])\s|\n", plain.text(teaching))
  if any(named.search(each) and not other.search(each) for each in sentences):
    return True
  text = options.get(letter, "").casefold().strip(" .")
  return quantities.parse(text) is None and any(
    text in each
    and not each.rstrip().endswith("?")
    and not any(
      option.casefold() in each
      for key, option in options.items()
      if key != letter
    )
    for each in map(str.casefold, sentences)
    if text
  )
