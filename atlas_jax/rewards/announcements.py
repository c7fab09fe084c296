# SPDX-License-Identifier: Apache-2.0
"""Detects whether a sentence announces a number or a text as the result."""

import dataclasses
import re

_MAX_CONTEXT = 160  # Characters on each side of an occurrence.

# All patterns are of normalized lower-case text, where "one" is 1.
_RESULT = r"(?:answer|result|solution|total|sum|value|outcome)"
_RANK = r"(?:\w+est|(?:larg|great|small|bigg|long|short|old|young|high|low)er)"
# Between an announcement and the answer.
_FILLER = (
  r"(?:[\s*:,(\[{\"']|\b(?:just|exactly|only|about|simply|therefore|thus|then|"
  r"now|also|(?:a|the) \w+ of|an?|the|as|with|that|length|[a-z] =|\d+ and)\s)*$"
)
# Announcements whatever their subject, and those that depend on it.
_STRONG = re.compile(
  r"(?:=|\\boxed\s*\{|<(?:solution|answer)>|"
  rf"\b{_RESULT}(?: (?:(?:must|should|will) be|is|are|happens to be))?|"
  r"\b(?:equals?|equal to|gets?|got|gives?|giving|obtain|yields?|leaves|makes?|"
  r"leaving|left with|(?:sums?|adds? up) to|should (?:count|see|reach)|"
  r"comes? (?:out )?(?:to|as)|works? out (?:to|as)|becomes?|"
  r"(?:evaluates|simplifies|reduces|amounts) to|turns? out to be|"
  r"(?:you|we|will|should|must) find|ends? (?:up )?with|the same as))" + _FILLER
)
_WEAK = re.compile(
  r"\b(?P<verb>is|are|it's|that's|be|was|has|have|had|paid|took|"
  r"(?:pay|cost|need|take|weigh|earn|owe)s?|(?:need|weigh|earn)ed|"
  r"travels(?: for)?|plug(?:ging)? in)\b" + _FILLER
)
_ORDER = re.compile(
  r"\b(?:say|answer|report|write|choose|pick|select|submit|enter|reply|"
  r"go (?:for|with))(?: with)?" + _FILLER
)
_LAST = re.compile(
  r"(?:\n|[:;]|\b(?:so|thus|therefore|hence|after|count\b[^.]*,))[\s,*(]*$"
)
_AFTER = re.compile(
  r"[\s)*}]*(?:(?:and|or) \S+ )?(?:[a-z]+ ){0,3}?(?:(?:is|are|was|were) )?"
  r"(?:left|remains?|remaining|altogether|in (?:all|total)|comes? next|works?|"
  r"fits?|(?:is|are) (?:the|your) (?:right|correct|best)|"
  rf"(?:is|are) (?:the|your) (?:\w+ )?(?:{_RESULT}|{_RANK})|"
  rf"(?:is|are) (?:what|it|correct|right|{_RANK}))\b"
)
_END = re.compile(r"[\s)*}\].!\"']*(?:[a-z]+[\s.!)}]*){0,2}$")
_CLAUSE_END = re.compile(r"[\s)*}\"']*(?:$|[.!;,](?!\d)|(?:as|for|of them)\b)")
_HEDGE = re.compile(
  r"(?:\b(?:whether|suppose|assume|not|never|unless|if(?! you| we))\b|n't\b)"
  r"[^,]*$|\b(?:for (?:example|instance)|e\.g|such as)\b"
)
# "a triangle has", unless the question is about "a triangle".
_GENERAL = re.compile(
  r"(?:and |but |so |since |because )?"
  r"((?:an?|each|every|any|1|all) (?!pays|gets|has|costs|is)[a-z-]+) "
)
# "with x = 3", for a 3 of the question.
_SETTING = re.compile(r"\b(?:with|let|where|set|us(?:e|ing)|put|for|when|at)\b")
_FACT = re.compile(
  r"\s*(?:[a-z]+ (?:in|per|to) (?:an?|each|every|1)|to [a-z]+)\b"
)
# A factor or summand: "3(x + 1)", "3 - x", "3 times the base", "3x".
_OPERAND = re.compile(
  r"\(|\s*(?:[-+*/^]\s*(?:[a-z]\b|\()|times [a-z]|[b-fnp-rtx-z]\b)"
)
_COUNTED = re.compile(
  r"\s*(?:\w+ )?(?:step|part|case|equation|unknown|term|thing|way|move|number|"
  r"digit|variable|root|factor|side|group)s?\b"
)


@dataclasses.dataclass(frozen=True)
class Place:
  """An occurrence of an answer, and the question it answers."""

  before: str
  found: str
  after: str
  question: str
  given: bool  # Whether the question contains the answer.

  @property
  def clause(self) -> str:
    """The part of the sentence before the answer."""
    return re.split(r"[.!?;:]\s|\n", self.before)[-1]

  @property
  def is_hedged(self) -> bool:
    """Whether the sentence is a condition, a negation or a question."""
    rest = re.split(r"(?<=[.!?;\n])(?!\d)", self.after)[0]
    return bool(_HEDGE.search(self.clause)) or rest.strip().endswith("?")

  @property
  def is_asked(self) -> bool:
    """Whether the counted noun follows: "How many apples" and "3 apples"."""
    asked = re.search(r"\bhow many ([a-z]+)", self.question)
    noun = re.match(r"\s*(?:more )?([a-z]+)", self.after)
    if not asked or not noun:
      return False
    if asked[1] in ("are", "is", "were", "did", "does", "left", "stay"):
      return bool(re.search(rf"\d {noun[1]}\b", self.question))
    return asked[1] == noun[1]

  @property
  def is_restated(self) -> bool:
    """Whether the question has the same words around the answer."""
    last = re.search(r"\S*\s*$", self.before)
    following = re.match(r"\s*\w+(\s+\w+)?", self.after)
    if last and last[0].strip() == "=" and _SETTING.search(self.clause):
      return True
    if not last or not following:
      return False
    one = last[0] + self.found + following[0].removesuffix(following[1] or "")
    two = self.found + following[0]
    return one in self.question or bool(following[1] and two in self.question)


def locate(
  text: str, start: int, end: int, *, question: str, given: bool
) -> Place:
  """Returns the place of text[start:end].

  Args:
    text: a teaching in lower case.
    start: start of the occurrence.
    end: end of the occurrence.
    question: the question, normalized like the text.
    given: whether the question contains the answer.
  """
  # The line break marks the start of the text.
  before = ("\n" + text)[max(0, start + 1 - _MAX_CONTEXT) : start + 1]
  after = text[end : end + _MAX_CONTEXT]
  return Place(before, text[start:end], after, question, given)


def is_number_announced(place: Place) -> bool:
  """Returns whether a number is announced as the result."""
  after = place.after
  if (
    place.is_hedged
    or _OPERAND.match(after)
    or _FACT.match(after)
    or (_COUNTED.match(after) and not place.is_asked)
    or (place.given and place.is_restated)
  ):
    return False
  if _states(place) or (_LAST.search(place.before) and _END.match(after)):
    return True
  general = _GENERAL.match(re.split(r",\s", place.clause)[-1])
  if general and general[1] not in place.question:
    return False
  if _STRONG.search(place.before) or (place.is_asked and not place.given):
    return True
  weak = _WEAK.search(place.before)
  return weak is not None and _is_about_the_result(place, weak)


def is_text_announced(place: Place, *, is_verdict: bool) -> bool:
  """Returns whether a text is announced as the result.

  Args:
    place: an occurrence of the text.
    is_verdict: whether the text is a common word such as "no", which must end
      its clause and not depend on a condition.
  """
  ends = _CLAUSE_END.match(place.after)
  if place.is_hedged or re.match(" (?:of|for)", place.after):
    return False
  if is_verdict and (not ends or re.search(r"\bif\b", place.clause)):
    return False
  return bool(
    _states(place)
    or _STRONG.search(place.before)
    or _WEAK.search(place.before)
    or (_LAST.search(place.before) and ends)
  )


def _states(place: Place) -> bool:
  """Returns whether "choose X", "X is the answer" or "degree X" occurs."""
  asked = re.search(r"\b(?:what is|find) the (\w+)", place.question)
  if asked and re.search(rf"\b{asked[1]}:? $", place.before):
    return not place.given or asked[1] != "number"
  return bool(
    _AFTER.match(place.after)
    or (_ORDER.search(place.before) and _CLAUSE_END.match(place.after))
  )


def _is_about_the_result(place: Place, weak: re.Match[str]) -> bool:
  """Returns whether a sentence with a verb like "is" states the result."""
  subject = re.split(r"[.!?;:]\s|\n", place.before[: weak.start()])[-1]
  if weak["verb"] in ("it's", "that's"):
    return True
  if place.given:
    last = re.split(r"[.!?]\s", place.question)[-1]
    verb = weak["verb"].removesuffix("s")
    return bool(
      re.search(
        rf"\b(?:it|that|this|[a-z]|the \w+ 1|{_RESULT}|{_RANK})\s(?:\w+ )?$",
        subject,
      )
      or any(word in subject for word in re.findall(r"[a-z]{4,}", last))
      or (place.is_asked and re.search(rf"\b{verb}\b", last))
    )
  if weak["verb"] in ("has", "have", "had") or subject.endswith("there "):
    noun = re.match(r"\s*(?:more )?([a-z]+)", place.after)
    return bool(
      _CLAUSE_END.match(place.after)
      or (noun and re.search(rf"\b{noun[1]}\b", place.question))
      or f"{subject.strip()} have" in place.question
      or re.search(r"\b(?:s?he|they|it|you|we) (?:still |now )?$", subject)
    )
  return True
