# SPDX-License-Identifier: Apache-2.0
r"""R0, the reward of reinforcement-learned teachers.

Let t be the tokens of the teaching and s those of the reference solution. The
student scores both as a completion of the question's prompt:

  r_SS = a_mean mean_s log p_student + a_min min_s log p_student
  r_KL = l_mean mean_t g + l_max max_t g,  g = log p_teacher - log p_student
  R0 = r_SS - r_KL - unclosed [no teaching]

g estimates KL(teacher || student) at each sampled token; log p_teacher is the
sampler's log-probability. Tokens that contain part of the <teaching> tags are
left out, as are those of thinking inside of the teaching. If there is no
teaching, the whole completion is used in its place.
The reward is missing if a term is not finite. Leaks are not checked: r_KL
penalizes teachings that the student would not have written itself.

Source: Cetin et al., arXiv:2506.08388, section 3.
"""

import bisect
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
import re

from atlas_jax import chat, errors, types

# As in the extraction of teachings from completions; see teaching/templates.py.
_THINKING = re.compile(r"<(think(?:ing)?)>.*?(?:</\1>|\Z)", re.DOTALL)
_LAYOUT = re.compile(r"(.*)\{teaching\}(.*)\{solution\}", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Student:
  """The student's log-probabilities, tokenizer and prompts.

  `prompt` returns the prompt of a question without a teaching. The teacher must
  use the same `tokenizer`.
  """

  score: types.Score
  tokenizer: chat.Tokenizer
  prompt: Callable[[types.Question], types.Prompt]


@dataclasses.dataclass(frozen=True)
class _Case:
  """The tokens of a record that the student scores, with the rewarded spans.

  prompt | before  teaching  between  solution
           ^ index 0 of `completion`; `teaching` and `solution` are slices
  """

  prompt: types.Prompt
  completion: tuple[int, ...]
  teaching: slice
  solution: slice
  teacher_logprobs: tuple[float, ...]
  is_closed: bool


@dataclasses.dataclass(frozen=True)
class Coefficients:
  """Coefficients of R0: a_mean, a_min, l_mean, l_max and unclosed."""

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
  """Returns the reward function R0.

  Args:
    student: computes log-probabilities.
    layout: template of the completion that the student scores, with {teaching}
      followed by {solution}; text after {solution} is ignored.
    temperature: of the student's log-probabilities.
    coefficients: fields of `Coefficients`.

  Raises:
    errors.ConfigError: if the layout lacks a placeholder or their order is
      wrong.
  """
  match = _LAYOUT.match(layout)
  if match is None:
    raise errors.ConfigError(
      "layout must contain {teaching} followed by {solution}, got "
      f"{layout!r}.",
      where="--config.reward.rlt.layout",
      why="The student scores a completion built from this template.",
      fix="Add the missing placeholder, with {teaching} first.",
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
  """Computes R0 of one record from the student's log-probabilities."""
  if logprobs is None:
    return types.Reward(None, "text exceeds the student's context")
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
  """Builds the tokens that the student scores, or returns why it cannot."""
  completion = record.teacher_rollout.completion
  kept = _kept(student.tokenizer, completion, record.teaching)
  teaching = [completion.token_ids[i] for i in kept]
  text = record.question.solution or record.question.answer
  solution = _encode(student.tokenizer, text)
  if not teaching:
    return "the teaching has no token without part of a tag"
  if not solution:
    return "the question has no solution"
  start = len(before)
  end = start + len(teaching)
  return _Case(
    prompt=student.prompt(record.question),
    completion=(*before, *teaching, *between, *solution),
    teaching=slice(start, end),
    solution=slice(end + len(between), end + len(between) + len(solution)),
    teacher_logprobs=tuple(completion.logprobs[i] for i in kept),
    is_closed=record.teaching is not None,
  )


def _kept(
  tokenizer: chat.Tokenizer, completion: types.Completion, teaching: str | None
) -> list[int]:
  """Returns the indices of the tokens that contain only the teaching.

  Without a teaching, these are all tokens up to the stop token.

    text    <teaching>a <think>b</think> c</teaching>
    spans             ..                ..
  """
  token_ids = completion.token_ids
  if teaching is None:
    return [*range(len(token_ids) - (completion.finish_reason == "stop"))]

  def num_characters(num_tokens: int) -> int:
    return len(chat.decode(tokenizer, token_ids[:num_tokens]))

  text = chat.decode(tokenizer, token_ids)
  indices = range(len(token_ids) + 1)
  kept: list[int] = []
  for start, end in _spans(text, teaching):
    first = bisect.bisect_left(indices, start, key=num_characters)
    last = bisect.bisect_right(indices, end, key=num_characters) - 1
    kept += range(first, last)
  return kept


def _spans(text: str, teaching: str) -> list[tuple[int, int]]:
  """Returns the spans of a teaching in a text, without thinking in between."""
  thinking = [match.span() for match in _THINKING.finditer(text)]
  starts = [0, *(end for _, end in thinking)]
  ends = [*(start for start, _ in thinking), len(text)]
  public = list(zip(starts, ends, strict=True))
  tagged = rf"<teaching>\s*({re.escape(teaching)})\s*</teaching>"
  joined = "".join(text[start:end] for start, end in public)
  # The last match: earlier ones are drafts, if a chat template opens thinking.
  matches = [match.span(1) for match in re.finditer(tagged, joined)]
  if not matches:
    return []
  first, last = matches[-1]
  spans, done = [], 0
  for start, end in public:
    # Part of the match in text[start:end], which begins at joined[done].
    low, high = max(first, done), min(last, done + end - start)
    if low < high:
      spans.append((low - done + start, high - done + start))
    done += end - start
  return spans


def _encode(tokenizer: chat.Tokenizer, text: str) -> tuple[int, ...]:
  return tuple(tokenizer.encode(text, add_special_tokens=False))
