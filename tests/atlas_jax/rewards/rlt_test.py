# SPDX-License-Identifier: Apache-2.0
"""Tests R0 against the paper's formula and its token spans."""

import dataclasses
import math

import pytest

from atlas_jax import chat, errors, types
from atlas_jax.rewards import rlt
from atlas_jax.teaching import templates
from tests import fakes

_LAYOUT = "<think>\n{teaching}\n</think>\n\n<solution>\n{solution}"
_COEFFICIENTS = {
  "solution_mean": 1.0,
  "solution_min": 0.01,
  "kl_mean": 3.0,
  "kl_max": 0.03,
  "unclosed_penalty": 1.0,
}
_RECIPE = {
  "layout": _LAYOUT,
  "temperature": 0.7,
  "coefficients": _COEFFICIENTS,
}
_TEACHING = "Add the tens first."
_TEXT = (
  f"<think><teaching>no</teaching></think> <teaching> {_TEACHING}\n</teaching>"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return fakes.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def _record(tokenizer, text=_TEXT, teaching=_TEACHING, solution="12 + 30 = 42"):
  token_ids = tokenizer.encode(text, add_special_tokens=False)
  token_ids.append(tokenizer.eos_token_id)
  logprobs = tuple(-0.01 * i for i in range(len(token_ids)))
  completion = types.Completion(tuple(token_ids), logprobs, logprobs, "stop", 0)
  return types.TeachingRecord(
    question=types.Question("q", "What is 12 + 30?", "42", solution=solution),
    probe="",
    teacher_rollout=types.Rollout(types.Prompt("q", "", (1,)), completion),
    teaching=teaching,
    num_teaching_tokens=1,
    baseline=(),
    taught=(),
  )


class _Student:
  """Returns the log-probabilities of a test and records its arguments."""

  def __init__(self, logprob):
    self.logprob, self.calls = logprob, []

  def __call__(self, prompts, completions, *, temperature):
    self.calls.append((prompts, completions, temperature))
    return [
      None
      if self.logprob is None
      else tuple(map(self.logprob, range(len(completion))))
      for completion in completions
    ]


def _reward(tokenizer, record, logprob, **changes):
  score = _Student(logprob)
  student = rlt.Student(
    score, tokenizer, lambda q: types.Prompt(q.row_id, q.question, (5, 6))
  )
  (reward,) = rlt.build(student, **{**_RECIPE, **changes})([record])
  return reward, score


def test_the_student_scores_teaching_and_solution_as_its_completion(tokenizer):
  _, score = _reward(tokenizer, _record(tokenizer), lambda _: -1.0)
  ((prompts, completions, temperature),) = score.calls
  assert prompts == [types.Prompt("q", "What is 12 + 30?", (5, 6))]
  text = chat.decode(tokenizer, completions[0])
  assert (
    text.split()
    == _LAYOUT.format(teaching=_TEACHING, solution="12 + 30 = 42").split()
  )
  assert temperature == 0.7


def test_the_formula_has_its_golden_value():
  case = rlt._Case(
    types.Prompt("q", "", (1,)),
    completion=(0,) * 7,
    teaching=slice(1, 3),
    solution=slice(4, 7),
    teacher_logprobs=(-1.0, -1.0),
    is_closed=True,
  )
  # Gaps are 2 and -1.8: mean 0.1, max 2. Solution: mean -0.2, min -3.
  logprobs = (9.0, -3.0, 0.8, 9.0, -3.0, 1.2, 1.2)
  terms = rlt.Coefficients(**_COEFFICIENTS)
  reward = rlt._reward(case, logprobs, terms)
  assert reward.parts == pytest.approx(
    {
      "solution_mean": -0.2,
      "solution_min": -0.03,
      "kl_mean": -0.3,
      "kl_max": -0.06,
      "unclosed": 0.0,
    }
  )
  assert reward.value == pytest.approx(-0.59)
  unclosed = dataclasses.replace(case, is_closed=False)
  reward = rlt._reward(unclosed, logprobs, terms)
  assert reward.value == pytest.approx(-1.59)


def test_each_term_reads_its_own_tokens(tokenizer):
  record = _record(tokenizer)
  plain, score = _reward(tokenizer, record, lambda _: -1.0)
  completion = score.calls[0][1][0]
  num_solution = len(tokenizer.encode("12 + 30 = 42"))
  start = len(tokenizer.encode("<think>\n"))
  last = len(completion) - 1
  solution = range(len(completion) - num_solution, len(completion))

  def changed(index):
    reward, _ = _reward(
      tokenizer, record, lambda i: -1.5 if i == index else -1.0
    )
    return {k for k, v in reward.parts.items() if v != plain.parts[k]}

  assert changed(start - 1) == set()
  assert changed(start) >= {"kl_mean"}
  assert not changed(start) & {"solution_mean", "solution_min"}
  assert changed(solution[0] - 1) == set()
  assert changed(solution[0]) == {"solution_mean", "solution_min"}
  assert changed(last) == {"solution_mean", "solution_min"}


def test_the_teachers_logprobs_are_those_of_the_teachings_tokens(tokenizer):
  record = _record(tokenizer)
  completion = record.teacher_rollout.completion
  kept = rlt._kept(tokenizer, completion, _TEACHING)
  text = chat.decode(tokenizer, [completion.token_ids[i] for i in kept])
  assert text.strip() == _TEACHING
  reward, _ = _reward(tokenizer, record, lambda _: -1.0)
  gaps = [completion.logprobs[i] + 1.0 for i in kept]
  assert reward.parts["kl_mean"] == pytest.approx(-3 * sum(gaps) / len(gaps))
  assert reward.parts["kl_max"] == pytest.approx(-0.03 * max(gaps))


@pytest.mark.parametrize("border", ["", " ", "\n", "\n\n", "\u00e9 \u6570 "])
def test_border_tokens_that_hold_the_tag_are_left_out(tokenizer, border):
  teaching = f"\u6570{_TEACHING}\u00e9"
  text = f"{border}<teaching>{teaching}</teaching>"
  completion = _record(tokenizer, text).teacher_rollout.completion
  indices = rlt._kept(tokenizer, completion, teaching)
  kept = chat.decode(tokenizer, [completion.token_ids[i] for i in indices])
  assert kept in teaching
  assert len(kept) >= len(teaching) - 2


@pytest.mark.parametrize(
  ("text", "teaching"),
  [
    ("<teaching>a <think>b</think> c</teaching>", "a c"),
    ("<teaching><think>b</think> c</teaching>", "c"),
    ("<teaching>a<thinking>b</thinking></teaching>", "a"),
    ("<teaching>a <think>b</teaching></think>c</teaching>", "a c"),
    (
      "<think><teaching>a c</teaching></think><teaching>a <think>b</think> "
      "c</teaching>",
      "a c",
    ),
    ("draft <teaching>a</teaching></think><teaching>a</teaching>", "a"),
  ],
)
def test_thinking_inside_of_the_teaching_is_left_out(tokenizer, text, teaching):
  extracted = templates.extract_teaching(
    chat.without_thinking(text, is_open=False)
  )
  assert extracted.split() == teaching.split()
  record = _record(tokenizer, text, teaching=extracted)
  completion = record.teacher_rollout.completion
  kept = rlt._kept(tokenizer, completion, extracted)
  assert [*kept] == sorted({*kept})
  tokens = [completion.token_ids[i] for i in kept]
  assert chat.decode(tokenizer, tokens).split() == teaching.split()
  reward, score = _reward(tokenizer, record, lambda _: -1.0)
  assert reward.parts["unclosed"] == 0.0
  gaps = [completion.logprobs[i] + 1.0 for i in kept]
  assert reward.parts["kl_mean"] == pytest.approx(-3 * sum(gaps) / len(gaps))
  assert "b" not in chat.decode(tokenizer, score.calls[0][1][0])


def test_a_teaching_that_is_not_in_the_completion_has_no_reward(tokenizer):
  record = _record(tokenizer, teaching="Another text.")
  reward, _ = _reward(tokenizer, record, lambda _: -1.0)
  assert reward.value is None
  assert "no token" in reward.missing_reason


def test_without_a_teaching_the_whole_completion_is_scored(tokenizer):
  record = _record(tokenizer, text="Add them up", teaching=None)
  reward, score = _reward(tokenizer, record, lambda _: -1.0)
  assert reward.parts["unclosed"] == -1.0
  assert "Add them up" in chat.decode(tokenizer, score.calls[0][1][0])
  assert tokenizer.eos_token_id not in score.calls[0][1][0]


def test_the_answer_replaces_a_missing_solution(tokenizer):
  record = _record(tokenizer, solution="")
  _, score = _reward(tokenizer, record, lambda _: -1.0)
  assert chat.decode(tokenizer, score.calls[0][1][0]).endswith("\n42")


@pytest.mark.parametrize(
  ("logprob", "reason"),
  [
    (None, "context"),
    (lambda _: math.nan, "not finite"),
    (lambda _: -math.inf, "not finite"),
  ],
)
def test_rewards_that_cannot_be_computed_are_missing(
  tokenizer, logprob, reason
):
  reward, _ = _reward(tokenizer, _record(tokenizer), logprob)
  assert reward.value is None
  assert reason in reward.missing_reason


def test_a_missing_record_does_not_shift_the_others(tokenizer):
  empty = _record(tokenizer, text="", teaching=None)
  record = _record(tokenizer)
  student = rlt.Student(
    _Student(lambda _: -1.0), tokenizer, lambda _: types.Prompt("q", "", (1,))
  )
  reward_fn = rlt.build(student, **_RECIPE)
  alone = reward_fn([record])[0]
  first, second, third = reward_fn([empty, record, empty])
  assert first.value is third.value is None
  assert second == alone


@pytest.mark.parametrize(
  "layout", ["{teaching}", "{solution} {teaching}", "", "{teach} {solution}"]
)
def test_a_layout_without_both_placeholders_is_rejected(tokenizer, layout):
  with pytest.raises(errors.ConfigError, match="layout"):
    _reward(tokenizer, _record(tokenizer), lambda _: -1.0, layout=layout)
