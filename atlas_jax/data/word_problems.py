# SPDX-License-Identifier: Apache-2.0
"""Seeded generator of word problems, and of answers to them.

The synthetic world that recipes are tested in: problems with verifiable
answers, a student that computes well but misreads some wordings, and warm-up
data of mixed quality for a teacher. Everything is determined by a seed.

Each problem has a *method*: one or two operations. A wording is `easy` if the
student infers the method from it, `medium` if it does half of the time, and
`hard` if it nearly always infers another method.
"""

from collections.abc import Iterator
import dataclasses

import numpy as np

from atlas_jax import types

DIFFICULTIES = ("easy", "medium", "hard")
# Probability that the student infers the right method, by difficulty.
_INSIGHT = {"easy": 0.97, "medium": 0.5, "hard": 0.05}
# The method that the student infers when it misreads the wording.
_MISREAD = {
  ("add",): ("subtract",),
  ("subtract",): ("add",),
  ("multiply",): ("add",),
  ("divide",): ("subtract",),
  ("multiply", "add"): ("add", "multiply"),
  ("multiply", "subtract"): ("multiply", "add"),
  ("add", "multiply"): ("multiply", "add"),
}
_SIGNS = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}
# One wording per difficulty, by method.
_WORDINGS = {
  ("add",): (
    "{n} has {a} {o} and finds {b} more. How many {o} now?",
    "{n} keeps {a} {o} and a friend brings {b}. How many {o} in all?",
    "{n} lost {b} {o} and {a} are left. How many {o} before?",
  ),
  ("subtract",): (
    "{n} has {a} {o} and loses {b}. How many {o} now?",
    "{n} had {a} {o} and {b} are gone. How many {o} stay?",
    "{n} found {b} {o} and now has {a}. How many {o} before?",
  ),
  ("multiply",): (
    "{n} has {a} boxes of {b} {o}. How many {o} in all?",
    "{n} fills {a} bags and each takes {b} {o}. How many {o}?",
    "{n} brings {a} {o} on each of {b} days. How many {o}?",
  ),
  ("divide",): (
    "{n} shares {a} {o} among {b} friends. How many {o} each?",
    "{n} puts {a} {o} into {b} equal bags. How many {o} per bag?",
    "{n} needs {a} {o} and a box holds {b}. How many boxes?",
  ),
  ("multiply", "add"): (
    "{n} has {a} boxes of {b} {o} and finds {c} more. How many {o}?",
    "{n} keeps {c} {o} and gets {a} bags of {b}. How many {o} in all?",
    "{n} used up {a} bags of {b} {o} and {c} are left. How many before?",
  ),
  ("multiply", "subtract"): (
    "{n} has {a} boxes of {b} {o} and loses {c}. How many {o} now?",
    "{n} fills {a} bags with {b} {o} each but {c} are gone. How many stay?",
    "{n} found {c} {o} and now has {a} bags of {b}. How many before?",
  ),
}
_NAMES = (
  "Ada",
  "Ben",
  "Cleo",
  "Dan",
  "Eva",
  "Finn",
  "Gus",
  "Ida",
  "Kim",
  "Leo",
)
_OBJECTS = (
  "apples",
  "books",
  "cards",
  "coins",
  "eggs",
  "keys",
  "pens",
  "shells",
  "stamps",
  "stones",
)
_HINTS = {
  1: ("{first} the numbers.", "You should {first}.", "Just {first} here."),
  2: (
    "First {first}, then {second}.",
    "{first} before you {second}.",
    "You should {first} and then {second}.",
  ),
}
_VAGUE = (
  "Read the question again.",
  "Take your time.",
  "Think about the story.",
)
_PADDING = (
  "Read the question again and think about the story. Take your time, write "
  "each step down, and look at the numbers. "
)

Method = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Problem:
  """A word problem: a wording of a method, with a name, things and numbers."""

  row_id: str
  difficulty: str
  method: Method
  name: str
  thing: str
  numbers: tuple[int, ...]

  @property
  def text(self) -> str:
    """The question."""
    wording = _WORDINGS[self.method][DIFFICULTIES.index(self.difficulty)]
    numbers = dict(zip("abc", self.numbers, strict=False))
    return wording.format(n=self.name, o=self.thing, **numbers)

  @property
  def answer(self) -> str:
    """The result of the right method."""
    return str(_compute(self.method, self.numbers)[1])

  def question(self, paraphrase: "Problem | None" = None) -> types.Question:
    """Returns the problem as a question with its reference answer."""
    return types.Question(
      self.row_id,
      self.text,
      self.answer,
      difficulty=self.difficulty,
      paraphrase=paraphrase.text if paraphrase else "",
      paraphrase_answer=paraphrase.answer if paraphrase else "",
    )


def problems(count: int, seed: int, *, excluded: set[str]) -> list[Problem]:
  """Draws `count` problems with distinct texts that are not in `excluded`."""
  rng = np.random.default_rng(seed)
  drawn: dict[str, Problem] = {}
  while len(drawn) < count:
    problem = _draw(rng, row_id=f"{seed}-{len(drawn)}")
    if problem.text not in excluded and problem.text not in drawn:
      drawn[problem.text] = problem
  return list(drawn.values())


def paraphrases(
  problems: list[Problem], seed: int, *, excluded: set[str]
) -> list[Problem]:
  """Draws each problem again with other numbers, and so another answer.

  The texts are not in `excluded`.
  """
  rng = np.random.default_rng((seed, 1))  # Not the numbers of `problems`.
  drawn = []
  for problem in problems:
    other = problem
    while other.answer == problem.answer or other.text in excluded:
      numbers = _draw_numbers(rng, problem.method)
      other = dataclasses.replace(problem, numbers=numbers)
    drawn.append(other)
  return drawn


def student_rows(
  problems: list[Problem], seed: int
) -> Iterator[dict[str, str]]:
  """Yields the student's training rows: `question`, `kind`, `hint`, `reply`.

  Each problem yields a plan (`probe`), an answer without help (`baseline`) and
  answers to hints (`taught`): the student follows a hint, right or wrong, and
  answers as it would without help if the hint names no method.
  """
  rng = np.random.default_rng(seed)
  for problem in problems:
    row = {"question": problem.text}
    plan = " then ".join(_read(problem, rng))
    yield {**row, "kind": "probe", "hint": "", "reply": f"I will {plan}."}
    yield {**row, "kind": "baseline", "hint": "", "reply": _solve(problem, rng)}
    for _ in range(2):
      named = _random_method(problem, rng)
      hint = _hint(named, rng)
      if rng.random() < 0.2:
        hint = _PADDING + hint
      reply = _solve(problem, rng, named)
      yield {**row, "kind": "taught", "hint": hint, "reply": reply}
    if rng.random() < 0.3:
      vague = str(rng.choice(_VAGUE))
      reply = _solve(problem, rng)
      yield {**row, "kind": "taught", "hint": vague, "reply": reply}
    if rng.random() < 0.3:
      answer = int(rng.integers(2, 90))
      yield {
        **row,
        "kind": "taught",
        "hint": f"The answer is {answer}.",
        "reply": f"<solution>{answer}</solution>",
      }


def teacher_rows(
  problems: list[Problem], seed: int
) -> Iterator[dict[str, str]]:
  """Yields the teacher's warm-up rows: `question`, `probe`, `reply`.

  The quality of its guidance is mixed, and lowest for hard problems: right,
  wrong, vague, padded, revealing the answer, or without its tag.
  """
  rng = np.random.default_rng(seed)
  kinds = ("right", "wrong", "vague", "padded", "leak", "untagged")
  shares = {
    "easy": (0.52, 0.10, 0.20, 0.08, 0.07, 0.03),
    "medium": (0.40, 0.20, 0.22, 0.08, 0.07, 0.03),
    "hard": (0.28, 0.30, 0.24, 0.08, 0.07, 0.03),
  }
  for problem in problems:
    kind = str(rng.choice(kinds, p=shares[problem.difficulty]))
    plan = _read(problem, rng)
    verdict = "right" if plan == problem.method else "wrong"
    hint = _hint(problem.method, rng)
    if kind == "wrong":
      hint = _hint(_MISREAD[problem.method], rng)
    elif kind == "vague":
      hint = str(rng.choice(_VAGUE))
    elif kind == "padded":
      hint = _PADDING + hint
    elif kind == "leak":
      hint = f"The answer is {problem.answer}."
    reply = f"<thinking>The plan is {verdict}.</thinking>"
    reply += hint if kind == "untagged" else f"<teaching>{hint}</teaching>"
    probe = f"I will {' then '.join(plan)}."
    yield {"question": problem.text, "probe": probe, "reply": reply}


def _draw(rng: np.random.Generator, row_id: str) -> Problem:
  """Draws one problem."""
  method = list(_WORDINGS)[rng.integers(len(_WORDINGS))]
  level = int(rng.integers(len(DIFFICULTIES)))
  numbers = _draw_numbers(rng, method)
  name, thing = str(rng.choice(_NAMES)), str(rng.choice(_OBJECTS))
  return Problem(row_id, DIFFICULTIES[level], method, name, thing, numbers)


def _draw_numbers(rng: np.random.Generator, method: Method) -> tuple[int, ...]:
  """Draws the numbers of a problem."""
  largest = 7 if len(method) == 1 else 4
  a, b, c = (int(n) for n in rng.integers(2, largest + 1, size=3))
  # Wrong methods, too, must have results that the student can write.
  if len(method) == 1:
    a = max(a, b + 1)
  if method == ("subtract",):
    a += b
  elif method == ("divide",):
    a *= b
  c = min(c, a * b - 1)
  return (a, b) if len(method) == 1 else (a, b, c)


def _compute(method: Method, numbers: tuple[int, ...]) -> tuple[str, int]:
  """Applies the operations in order; returns the working and the result."""
  result, working = numbers[0], []
  for operation, number in zip(method, numbers[1:], strict=True):
    before = result
    if operation == "add":
      result = before + number
    elif operation == "subtract":
      result = before - number
    elif operation == "multiply":
      result = before * number
    else:
      result = before // number
    working.append(f"{before} {_SIGNS[operation]} {number} = {result}")
  return ", ".join(working), result


def _read(problem: Problem, rng: np.random.Generator) -> Method:
  """Draws the method that the student infers from the wording."""
  if rng.random() < _INSIGHT[problem.difficulty]:
    return problem.method
  return _MISREAD[problem.method]


def _random_method(problem: Problem, rng: np.random.Generator) -> Method:
  """Draws a method of the same length, the right one half of the time."""
  if rng.random() < 0.5:
    return problem.method
  same_length = [
    m
    for m in (*_WORDINGS, ("add", "multiply"))
    if len(m) == len(problem.method)
  ]
  return same_length[rng.integers(len(same_length))]


def _hint(method: Method, rng: np.random.Generator) -> str:
  wording = str(rng.choice(_HINTS[len(method)]))
  hint = wording.format(first=method[0], second=method[-1])
  return hint[0].upper() + hint[1:]


def _solve(
  problem: Problem, rng: np.random.Generator, named: Method | None = None
) -> str:
  """Returns the student's answer by the `named` method, or an inferred one."""
  method = named or _read(problem, rng)
  working, result = _compute(method, problem.numbers)
  return f"{working}. <solution>{result}</solution>"
