# SPDX-License-Identifier: Apache-2.0
r"""R0, the reward of reinforcement-learned teachers.

With t the tokens of the teaching and s those of the reference solution, the
student reads, after the question, both as its own words:

  r_SS = a_mean mean_s log p_student + a_min min_s log p_student
  r_KL = l_mean mean_t g + l_max max_t g,  g = log p_teacher - log p_student
  R0 = r_SS - r_KL - unclosed [no teaching]

g estimates KL(teacher || student) at each token that the teacher drew; the
teacher's log-probability is that it drew it with. Tokens at the border of the
teaching, which hold some of its tag, are left out. Where there is no teaching,
all that was written stands in for it. Numbers that are not finite make the
reward missing. No leak is looked for: the second term is what keeps a teaching
to words that the student could have thought of.

Source: Cetin et al., arXiv:2506.08388, section 3.
"""

import bisect
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
import re

from atlas_jax import chat, errors, types

_LAYOUT = re.compile(r"(.*)\{teaching\}(.*)\{solution\}", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Student:
  """Who reads a teaching: what it thinks of tokens, and how it is asked.

  `prompt` gives the prompt of a question without any teaching. The teacher's
  `tokenizer` must be the student's.
  """

  score: types.Score
  tokenizer: chat.Tokenizer
  prompt: Callable[[types.Question], types.Prompt]


@dataclasses.dataclass(frozen=True)
class _Case:
  """A record as the student reads it, with the spans that count."""

  prompt: types.Prompt
  completion: tuple[int, ...]
  teaching: slice
  solution: slice
  teacher_logprobs: tuple[float, ...]
  is_closed: bool


@dataclasses.dataclass(frozen=True)
class Coefficients:
  """The weights of the terms: a, a, l, l of the formula, and the penalty."""

  solution_mean: float
  solution_min: float
  kl_mean: float
  kl_max: float
  unclosed_penalty: float


def build(
  student: Student,
  *,
  layout: str,
  temperature: float,
  coefficients: Mapping[str, float],
) -> types.RewardFn:
  """Makes the reward function.

  Args:
    student: scores.
    layout: what the student is taken to have written, with {teaching} and then
      {solution} in it; what follows that is of no account.
    temperature: of the student's log-probabilities.
    coefficients: those of `Coefficients`.

  Raises:
    errors.ConfigError: if the layout does not hold both, in this order.
  """
  match = _LAYOUT.match(layout)
  if match is None:
    raise errors.ConfigError(
      "The layout of a student's answer lacks a part.",
      where="--config.reward.rlt.layout",
      why=f"It is {layout!r}.",
      fix="Put {teaching} into it, and after it {solution}.",
    )
  before, between = (
    _encode(student.tokenizer, part) for part in match.groups()
  )
  terms = Coefficients(**coefficients)

  def reward_fn(records: Sequence[types.TeachingRecord]) -> list[types.Reward]:
    cases = [_case(record, student, before, between) for record in records]
    whole = [case for case in cases if isinstance(case, _Case)]
    scores = iter(
      student.score(
        [case.prompt for case in whole],
        [case.completion for case in whole],
        temperature=temperature,
      )
    )
    return [
      _reward(case, next(scores), terms)
      if isinstance(case, _Case)
      else types.Reward(None, case)
      for case in cases
    ]

  return reward_fn


def _reward(
  case: _Case, logprobs: Sequence[float] | None, terms: Coefficients
) -> types.Reward:
  """Computes R0 of one record, out of the student's log-probabilities."""
  if logprobs is None:
    return types.Reward(None, "it exceeds the student's context")
  solution = logprobs[case.solution]
  gaps = [
    ours - theirs
    for ours, theirs in zip(
      case.teacher_logprobs, logprobs[case.teaching], strict=True
    )
  ]
  parts = {
    "solution_mean": terms.solution_mean * sum(solution) / len(solution),
    "solution_min": terms.solution_min * min(solution),
    "kl_mean": -terms.kl_mean * sum(gaps) / len(gaps),
    "kl_max": -terms.kl_max * max(gaps),
    "unclosed": 0.0 if case.is_closed else -terms.unclosed_penalty,
  }
  if not all(map(math.isfinite, parts.values())):
    return types.Reward(None, "a log-probability is not finite")
  return types.Reward(sum(parts.values()), parts=parts)


def _case(
  record: types.TeachingRecord,
  student: Student,
  before: tuple[int, ...],
  between: tuple[int, ...],
) -> _Case | str:
  """Lays out what the student reads, or tells why it cannot be."""
  completion = record.teacher_rollout.completion
  span = _span(student.tokenizer, completion, record.teaching)
  teaching = completion.token_ids[span]
  text = record.question.solution or record.question.answer
  solution = _encode(student.tokenizer, text)
  if not teaching:
    return "the teaching has no token of its own"
  if not solution:
    return "the question has no solution"
  start = len(before)
  end = start + len(teaching)
  return _Case(
    prompt=student.prompt(record.question),
    completion=(*before, *teaching, *between, *solution),
    teaching=slice(start, end),
    solution=slice(end + len(between), end + len(between) + len(solution)),
    teacher_logprobs=completion.logprobs[span],
    is_closed=record.teaching is not None,
  )


def _span(
  tokenizer: chat.Tokenizer, completion: types.Completion, teaching: str | None
) -> slice:
  """Finds the tokens that hold a teaching and nothing else.

  Without one they are all, but for the token that stopped them.
  """
  token_ids = completion.token_ids
  if teaching is None:
    return slice(0, len(token_ids) - (completion.finish_reason == "stop"))
  text = chat.decode(tokenizer, token_ids)
  tagged = rf"<teaching>\s*({re.escape(teaching)})\s*</teaching>"
  # Drafts are in the thinking, which comes first.
  *_, (start, end) = (match.span(1) for match in re.finditer(tagged, text))

  def num_characters(num_tokens: int) -> int:
    return len(chat.decode(tokenizer, token_ids[:num_tokens]))

  indices = range(len(token_ids) + 1)
  first = bisect.bisect_left(indices, start, key=num_characters)
  last = bisect.bisect_right(indices, end, key=num_characters) - 1
  return slice(first, max(first, last))


def _encode(tokenizer: chat.Tokenizer, text: str) -> tuple[int, ...]:
  return tuple(tokenizer.encode(text, add_special_tokens=False))
