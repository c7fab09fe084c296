# SPDX-License-Identifier: Apache-2.0
"""Causes of equal rewards are found by counting, with the fix of each."""

import dataclasses

import pytest

from atlas_jax import types
from atlas_jax.train.guards import diagnosis

_RIGHT = types.Attempt("It is 4.", 5, "stop", correct=True, answer="4")
_WRONG = types.Attempt("It is 5.", 5, "stop", correct=False, answer="5")
_BARE = types.Attempt("Hm.", 2, "stop", correct=False)


def _record(reason="stop", **fields):
  completion = types.Completion((1,) * 48, (), (), reason, 0)
  record = types.TeachingRecord(
    question=types.Question("q0", "What is 2 + 2?", "4"),
    probe="Add.",
    teacher_rollout=types.Rollout(
      types.Prompt("q0/teach", "Teach 2 + 2.", (1,)), completion
    ),
    teaching="Count on.",
    num_teaching_tokens=2,
    baseline=(_WRONG,),
    taught=(_RIGHT,),
    leaked=False,
    completion_text="<teaching>Count on.</teaching>",
  )
  return dataclasses.replace(record, **fields)


def _causes(records, rewards=None):
  values = rewards or [types.Reward(0.0)] * len(records)
  return [str(cause) for cause in diagnosis.causes(records, values)]


def test_a_policy_without_tags_is_named_with_its_truncation():
  cut = [_record("length", teaching=None)] * 6
  whole = [_record(teaching=None)] * 2
  assert _causes(cut + whole) == [
    "8 of 8 completions lack <teaching>; 75% truncated at 48 tokens: raise "
    "--config.sampling.teach.max_completion_tokens, or run SFT first, or ask "
    "for the tags in --config.templates.teach"
  ]
  (cause,) = _causes(whole)
  assert cause.startswith("2 of 2 completions lack <teaching>: run SFT first")


@pytest.mark.parametrize(
  ("changes", "expected"),
  [
    ({"reason": "length"}, "completions: 100% truncated at 48 tokens: raise"),
    ({"leaked": True}, "4 of 4 teachings reveal the answer"),
    (
      {"taught": (dataclasses.replace(_RIGHT, finish_reason="length"),)},
      "answers of the student: 100% truncated at 5 tokens: raise "
      "--config.sampling.solve",
    ),
    ({"taught": ()}, "no answer was sampled"),
    (
      {"baseline": (_BARE,), "taught": (_BARE,)},
      "none of 5 answers has a final answer: ask in the template",
    ),
    ({"baseline": (_RIGHT,)}, "all 5 answers are correct, with and without"),
    ({"taught": (_WRONG,)}, "none of 5 answers is correct, with and without"),
    (
      {"baseline": (), "teaching": None, "taught": (_WRONG,)},
      "none of 4 answers is correct: ",
    ),
    ({}, "all 4 rewards are 0: check the weights"),
  ],
)
def test_a_cause_is_named_by_what_was_counted(changes, expected):
  (cause,) = _causes([_record(**changes)] * 4)
  assert cause.startswith(expected)


@pytest.mark.parametrize("answer", [_RIGHT, _WRONG])
def test_answers_alike_are_no_fault_of_a_single_question(answer):
  records = [_record(baseline=(answer,), taught=(answer,))]
  assert diagnosis.faults(records, [types.Reward(0.0)]) == []
  assert len(_causes(records)) == 1


def test_missing_rewards_are_counted_with_their_commonest_reason():
  rewards = [types.Reward(None, "raised KeyError")] * 2 + [types.Reward(1.0)]
  (cause,) = _causes([_record()] * 3, rewards)
  assert cause.startswith("2 of 3 rewards are missing (raised KeyError)")


def test_what_holds_for_few_records_is_not_a_cause():
  records = [_record("length", teaching=None), *[_record()] * 3]
  rewards = [types.Reward(float(i % 2)) for i in range(4)]
  assert _causes(records, rewards) == []


def test_a_sample_shows_each_text_on_one_short_line():
  record = _record("length", completion_text="a\n\x1b" * 900, baseline=(_BARE,))
  reward = types.Reward(0.5, parts={"gain": 0.25, "brevity": 0.25})
  lines = diagnosis.sample(record, reward).splitlines()
  shown = {line[2:28].strip(): line[28:] for line in lines}
  assert shown["probe"] == "Add."
  assert shown["prompt"] == "Teach 2 + 2."
  assert shown["completion"].startswith("a\\n\\x1ba\\n")
  assert shown["completion"].endswith("... [truncated]")
  assert shown["teaching"] == "Count on."
  assert shown["taught answer"] == "It is 4. [correct, final answer '4']"
  assert shown["answer without a teaching"] == "Hm. [wrong, final answer None]"
  assert shown["reward"] == "0.5 (gain=0.25 brevity=0.25)"
  assert max(map(len, lines)) < 450
