# SPDX-License-Identifier: Apache-2.0
"""Finds out by counting why the rewards of a step are equal or missing."""

import collections
from collections.abc import Iterator, Sequence
import dataclasses

from atlas_jax import types

# A cause is reported if it holds for at least this fraction.
_MIN_FRACTION = 0.5
_MAX_SHOWN = 400


@dataclasses.dataclass(frozen=True)
class Cause:
  """What was counted, and the action that changes it."""

  counted: str
  fix: str

  def __str__(self) -> str:
    """Returns both in one sentence."""
    return f"{self.counted}: {self.fix}"


def causes(
  records: Sequence[types.TeachingRecord], rewarded: Sequence[types.Reward]
) -> list[Cause]:
  """Returns what at least half of the records share and explains equal rewards.

  Args:
    records: graded, at least one. Without baseline answers they come from a
      policy that answers by itself, so that no teaching is expected.
    rewarded: one reward per record.
  """
  found = [*faults(records, rewarded), *_of_grades(records)]
  values = {reward.value for reward in rewarded}
  if not found and len(values) == 1:
    found.append(
      Cause(
        f"all {len(rewarded)} rewards are {_number(values.pop())}",
        "check the weights of --config.reward.weights and your --reward_fn",
      )
    )
  return found


def faults(
  records: Sequence[types.TeachingRecord], rewarded: Sequence[types.Reward]
) -> list[Cause]:
  """Returns the causes that are wrong even for a single question.

  These are all but answers that are all correct or all wrong; see `causes`.
  """
  has_student = _has_student(records)
  return [
    *_of_rewards(rewarded),
    *_of_completions(records, has_student=has_student),
    *_of_answers(records, has_student=has_student),
  ]


def sample(record: types.TeachingRecord, reward: types.Reward) -> str:
  """Formats the texts and the reward of one record, one per line."""
  answers = {
    "taught answer" if record.baseline else "answer": record.taught,
    "answer without a teaching": record.baseline,
  }
  lines = {
    "question": record.question.question,
    "reference": record.question.answer,
    "probe": record.probe,
    "prompt": record.teacher_rollout.prompt.text,
    "completion": _finished(
      record.completion_text, record.teacher_rollout.completion.finish_reason
    ),
    **({"teaching": record.teaching or "none"} if record.baseline else {}),
    **{
      name: f"{_finished(a.text, a.finish_reason)} [{_grade(a)}]"
      for name, attempts in answers.items()
      for a in attempts[:1]
    },
    "reward": _reward(reward),
  }
  return "\n".join(
    f"  {name:<26}{_shortened(text)}" for name, text in lines.items() if text
  )


def _of_rewards(rewarded: Sequence[types.Reward]) -> Iterator[Cause]:
  missing = [r.missing_reason for r in rewarded if r.value is None]
  if _is_most(len(missing), len(rewarded)):
    reason = collections.Counter(missing).most_common(1)[0][0]
    yield Cause(
      f"{len(missing)} of {len(rewarded)} rewards are missing ({reason})",
      "fix the reward; warnings above name each failure",
    )


def _of_completions(
  records: Sequence[types.TeachingRecord], *, has_student: bool
) -> Iterator[Cause]:
  """Checks tags, leaks and truncation of the policy's completions."""
  total = len(records)
  completions = [r.teacher_rollout.completion for r in records]
  cut = [len(c.token_ids) for c in completions if c.finish_reason == "length"]
  is_cut = _is_most(len(cut), total)
  truncated = (
    f"{len(cut) / total:.0%} truncated at {max(cut, default=0)} tokens"
  )
  longer = "raise --config.sampling.teach.max_completion_tokens"
  num_without = sum(record.teaching is None for record in records)
  if has_student and _is_most(num_without, total):
    lack = f"{num_without} of {total} completions lack <teaching>"
    sft = "run SFT first, or ask for the tags in --config.templates.teach"
    if is_cut:
      yield Cause(f"{lack}; {truncated}", f"{longer}, or {sft}")
    else:
      yield Cause(lack, sft)
  elif is_cut:
    yield Cause(f"completions: {truncated}", longer)
  num_leaks = sum(bool(record.leaked) for record in records)
  if _is_most(num_leaks, total):
    yield Cause(
      f"{num_leaks} of {total} teachings reveal the answer",
      "ask in --config.templates.teach not to state it",
    )


def _of_answers(
  records: Sequence[types.TeachingRecord], *, has_student: bool
) -> Iterator[Cause]:
  """Checks truncation and form of the answers."""
  taught = [a for r in records for a in r.taught]
  if not taught:
    yield Cause("no answer was sampled", "see the warnings above")
    return
  cut = [a.num_tokens for a in taught if a.finish_reason == "length"]
  if has_student and _is_most(len(cut), len(taught)):
    yield Cause(
      f"answers of the student: {len(cut) / len(taught):.0%} truncated at "
      f"{max(cut)} tokens",
      "raise --config.sampling.solve.max_completion_tokens",
    )
  answers = _answers(records)
  if all(a.answer is None for a in answers):
    yield Cause(
      f"none of {len(answers)} answers has a final answer",
      "ask in the template for \\boxed{} or <solution>; docs/rewards.md lists "
      "the forms",
    )


def _of_grades(records: Sequence[types.TeachingRecord]) -> Iterator[Cause]:
  """Checks whether all answers are correct, or all are wrong."""
  answers = _answers(records)
  both = ", with and without a teaching" if _has_student(records) else ""
  num_correct = sum(bool(a.correct) for a in answers)
  is_sampled = any(record.taught for record in records)
  if not is_sampled or all(a.answer is None for a in answers):
    return  # `_of_answers` reports it.
  if num_correct == len(answers):
    yield Cause(
      f"all {len(answers)} answers are correct{both}",
      "use harder questions",
    )
  elif not num_correct:
    yield Cause(
      f"none of {len(answers)} answers is correct{both}",
      "use easier questions, or compare answers with their references: they "
      "may differ in form",
    )


def _has_student(records: Sequence[types.TeachingRecord]) -> bool:
  return any(record.baseline for record in records)


def _answers(records: Sequence[types.TeachingRecord]) -> list[types.Attempt]:
  """Returns all answers, with and without a teaching."""
  taught = [a for r in records for a in r.taught]
  # All records of a question have the same baseline answers.
  baselines = {r.question: r.baseline for r in records}.values()
  return taught + [a for baseline in baselines for a in baseline]


def _is_most(count: int, total: int) -> bool:
  return count > 0 and count >= _MIN_FRACTION * total


def _number(value: float | None) -> str:
  return "missing" if value is None else f"{value:g}"


def _finished(text: str, reason: types.FinishReason) -> str:
  return text if reason == "stop" else f"{text} ... [truncated]"


def _grade(attempt: types.Attempt) -> str:
  verdict = "correct" if attempt.correct else "wrong"
  return f"{verdict}, final answer {attempt.answer!r}"


def _reward(reward: types.Reward) -> str:
  if reward.value is None:
    return f"missing: {reward.missing_reason}"
  parts = " ".join(f"{n}={v:.4g}" for n, v in reward.parts.items())
  return f"{reward.value:.4g} ({parts})" if parts else f"{reward.value:.4g}"


def _shortened(text: str) -> str:
  """Shows a text on one line, its middle left out if it is long.

  Other control characters are escaped too, which a terminal would execute.
  """
  text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
  if len(text) <= _MAX_SHOWN:
    return text
  half = _MAX_SHOWN // 2
  return f"{text[:half]} [...] {text[-half:]}"
