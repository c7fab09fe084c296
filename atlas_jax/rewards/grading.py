# SPDX-License-Identifier: Apache-2.0
"""Grades answers: the one grader of rewards, training and evaluation.

An answer is correct if `compare.equal` finds it equal to the reference, or else
if math-verify does, which is asked if the pair takes algebra.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import importlib.util
import re

from absl import logging

from atlas_jax import types
from atlas_jax.rewards import (
  answers,
  compare,
  isolated,
  leaks,
  quantities,
  rules,
)

_TARGET = "atlas_jax.rewards.math_grader:grade"
_MAX_CACHED = 200_000
_MAX_MEMORY_BYTES = 4 << 30  # Of one process: sympy expands large powers.
_ASKS_PERCENT = re.compile(
  r"\b(?:what|which|how many|as a)\s+(?:\w+\s+){0,2}?percent", re.IGNORECASE
)
_NUMERAL = re.compile(quantities.NUMERAL)


class Grader:
  """Grades records, with a cache of what math-verify found."""

  def __init__(
    self, verify: rules.Verify | None, from_first: types.OnFirstProcess
  ) -> None:
    """Stores how to ask math-verify.

    Args:
      verify: asks it; None compares answers by rules only.
      from_first: runs `verify` in the first process, since a deadline may pass
        in one process only. `verify` must be None in all processes or in none.
    """
    self.verify, self._from_first = verify, from_first
    self._verified: dict[tuple[str, str], bool] = {}
    self._num_failures = 0

  def grade(
    self, records: Sequence[types.TeachingRecord]
  ) -> list[types.TeachingRecord]:
    """Returns the records with `correct`, `answer` and `leaked` set.

    If the reference is a solution, its declared answer is used. A truncated
    answer is correct only if it declares the answer. An answer on which
    math-verify fails, or does not finish in time, is not correct. Answers that
    are graded already are kept.
    """
    pairs = [pair for record in records for pair in _pairs(record)]
    equal = dict(zip(pairs, self.equal(pairs), strict=True))
    return [_graded(record, equal.__getitem__) for record in records]

  def equal(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """Returns whether the first of each pair equals the second, a reference."""
    found = {pair: compare.equal(*pair) for pair in dict.fromkeys(pairs)}
    if self.verify is not None:
      open_pairs = [
        pair
        for pair, equal in found.items()
        if not equal and compare.needs_algebra(*pair)
      ]
      found |= self._ask(self.verify, open_pairs)
    return [found[pair] for pair in pairs]

  def take_num_failures(self) -> int:
    """Returns how many pairs math-verify failed on since the last call."""
    num_failures, self._num_failures = self._num_failures, 0
    return num_failures

  def _ask(
    self, verify: rules.Verify, pairs: Sequence[tuple[str, str]]
  ) -> dict[tuple[str, str], bool]:
    """Asks math-verify about the pairs that are not cached."""
    if len(self._verified) > _MAX_CACHED:
      self._verified.clear()
    new = [pair for pair in pairs if pair not in self._verified]
    if new:
      # None: math-verify failed, or cannot parse the reference.
      values = self._from_first(lambda: [a.value for a in verify(new)])
      self._verified |= {
        pair: value is True for pair, value in zip(new, values, strict=True)
      }
      if num_failures := values.count(None):
        self._num_failures += num_failures
        logging.warning(
          "math-verify failed on %d of %d answers; they count as wrong.",
          num_failures,
          len(new),
        )
    return {pair: self._verified[pair] for pair in pairs}


def by_rules() -> Grader:
  """Returns a grader that does not ask math-verify."""
  return Grader(None, lambda make: make())


@contextlib.contextmanager
def open_grader(
  *, timeout_s: float, num_workers: int, from_first: types.OnFirstProcess
) -> Iterator[Grader]:
  """Opens a grader; stops math-verify's processes on exit.

  They start when the first answer needs them. Without math-verify in the first
  process, answers are compared by rules only.

  Args:
    timeout_s: deadline of one comparison.
    num_workers: number of processes; math-verify does not run in threads.
    from_first: see `Grader`; a broadcast used only for this grader.
  """
  if not from_first(_is_installed):
    logging.warning(
      "math-verify is not installed: answers are compared by rules only, and "
      "x + 1 differs from 1 + x. Run pip install -r requirements/trainer.txt."
    )
    yield Grader(None, from_first)
    return
  limits = isolated.Limits(timeout_s, _MAX_MEMORY_BYTES)
  with isolated.Pool(_TARGET, limits, num_workers=num_workers) as pool:
    yield Grader(pool.map, from_first)


def _is_installed() -> bool:
  return importlib.util.find_spec("math_verify") is not None


def _pairs(record: types.TeachingRecord) -> list[tuple[str, str]]:
  """Returns each final answer of the student with the reference's."""
  question = record.question
  found = [_pair(question, a) for a in (*record.baseline, *record.taught)]
  rephrased = question.rephrased() or question
  found += [_pair(rephrased, a) for a in record.paraphrased]
  return [pair for pair in found if pair is not None]


def _graded(
  record: types.TeachingRecord, is_equal: Callable[[tuple[str, str]], bool]
) -> types.TeachingRecord:
  """Returns the record with `correct` and `leaked` set."""

  def graded(
    question: types.Question, attempts: tuple[types.Attempt, ...]
  ) -> tuple[types.Attempt, ...]:
    found = ((attempt, _pair(question, attempt)) for attempt in attempts)
    return tuple(
      attempt
      if attempt.correct is not None
      else dataclasses.replace(
        attempt,
        correct=pair is not None and is_equal(pair),
        answer=pair and pair[0],
      )
      for attempt, pair in found
    )

  question = record.question
  rephrased = question.rephrased() or question
  return dataclasses.replace(
    record,
    baseline=graded(question, record.baseline),
    taught=graded(question, record.taught),
    paraphrased=graded(rephrased, record.paraphrased),
    leaked=record.teaching is not None
    and leaks.reveals_answer(
      record.teaching,
      question.question,
      answers.of_reference(question.answer),
    ),
  )


def _pair(
  question: types.Question, attempt: types.Attempt
) -> tuple[str, str] | None:
  """Returns an answer to grade and what it must equal, or None.

  If the question asks for a percentage, the reference is one: 60 is 60%.
  """
  if attempt.correct is not None:
    return None
  is_cut = attempt.finish_reason == "length"
  answer = (answers.declared if is_cut else answers.extract)(attempt.text)
  if answer is None:
    return None
  reference = answers.of_reference(question.answer)
  if _ASKS_PERCENT.search(question.question):
    number = _NUMERAL.fullmatch(reference.strip())
    value = quantities.fraction(number[0]) if number else None
    # A number up to 1 may be the fraction.
    if value is not None and value > 1:
      reference = f"{reference}%"
  return answer, reference
