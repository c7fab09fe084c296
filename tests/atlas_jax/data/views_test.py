# SPDX-License-Identifier: Apache-2.0
"""Conversations, questions and problems of rows in each format."""

import dataclasses

import pytest

from atlas_jax import errors, types
from atlas_jax.data import formats, rows, views
from configs.data import arc_atlas, prompts

_FORMATS = formats.DATA_CONFIGS
_DEFAULT = _FORMATS["default"]
_CHAT = [
  {"role": "system", "content": "s"},
  {"role": "user", "content": "q"},
  {"role": "assistant", "content": "a"},
]
# A row of each known dataset, as its Hub page describes it, with the expected
# conversation and question.
_ARC_SFT = {
  "problem_text": "What is 2 + 2?",
  "student_approach": "I multiply.",
  "teacher_diagnosis": "It confuses the signs.",
  "teacher_teaching": "What does + ask for?",
}
_STRATOS = {
  "system": "Think at length.",
  "conversations": [
    {"from": "user", "value": "Halve one."},
    {
      "from": "assistant",
      "value": "<|begin_of_thought|>\n\nHm.\n\n<|end_of_thought|>\n\n"
      "<|begin_of_solution|>\n\nIt is $\\boxed{1}$, or rather "
      "\\boxed{\\frac{1}{2}}.\n\n<|end_of_solution|>",
    },
  ],
}
_GSM8K = {
  "question": "Two bags of 4?",
  "answer": "He has 2*4=<<2*4=8>>8 eggs.\n#### 1,008",
}
_META = {
  "query": "Two times X is 8. Find X.",
  "original_question": "What is half of 8?",
  "response": "X is 8 / 2.\n#### 4\nThe answer is: 4",
  "type": "GSM_SV",
}


def _row(**values):
  return rows.Row("train.jsonl", 1, "train", values)


@pytest.mark.parametrize(
  ("name", "values", "user", "assistant"),
  [
    (
      "arc_atlas_v0",
      _ARC_SFT,
      "What is 2 + 2?",
      "Student Approach:\nI multiply.\n\n"
      "Teacher Diagnosis:\nIt confuses the signs.\n\n"
      "Teacher Teaching:\nWhat does + ask for?",
    ),
    (
      "stratos",
      _STRATOS,
      "Halve one.",
      "<think>\nHm.\n</think>\n\nIt is $\\boxed{1}$, or rather "
      "\\boxed{\\frac{1}{2}}.",
    ),
    (
      "gsm8k",
      _GSM8K,
      "Two bags of 4?",
      "He has 2*4=8 eggs.\n<solution>1,008</solution>",
    ),
    ("meta_math", _META, _META["query"], _META["response"]),
    ("big_math", {"prompt": "1 + 1?", "solution": "2"}, "1 + 1?", "2"),
    ("default", {"prompt": "1 + 1?", "ground_truth": "2"}, "1 + 1?", "2"),
  ],
)
def test_known_datasets_make_conversations(name, values, user, assistant):
  *_, asked, answered = views.to_messages(_row(**values), _FORMATS[name])
  assert asked == types.Message("user", user)
  assert answered == types.Message("assistant", assistant)


@pytest.mark.parametrize(
  ("name", "values", "question", "answer", "solution"),
  [
    (
      "arc_atlas_v1",
      {"prompt": "", "input": "q", "solution": "5"},
      "q",
      "5",
      "5",
    ),
    (
      "arc_atlas_v1",
      {**_ARC_SFT, "question": "x", "answer": "4", "ground_truth": "5"},
      "What is 2 + 2?",
      "5",
      "",
    ),
    (
      "stratos",
      _STRATOS,
      "Halve one.",
      r"\frac{1}{2}",
      r"It is $\boxed{1}$, or rather \boxed{\frac{1}{2}}.",
    ),
    (
      "gsm8k",
      _GSM8K,
      "Two bags of 4?",
      "1,008",
      "He has 2*4=8 eggs.\n<solution>1,008</solution>",
    ),
    ("meta_math", _META, _META["query"], "4", _META["response"]),
    ("big_math", {"prompt": "1 + 1?", "solution": "2"}, "1 + 1?", "2", "2"),
    ("default", {"prompt": "1 + 1?", "ground_truth": "2"}, "1 + 1?", "2", ""),
    ("default", {"messages": _CHAT[1:]}, "q", "a", "a"),
    ("default", {"messages": _CHAT}, "System: s\n\nUser: q", "a", "a"),
    ("default", {"messages": _CHAT[1:], "answer": "7"}, "q", "7", "a"),
    ("default", {"question": "q", "answer": 7}, "q", "7", ""),
  ],
)
def test_known_datasets_make_questions(
  name, values, question, answer, solution
):
  made = views.to_question(_row(**values), _FORMATS[name])
  assert made == types.Question("train:1", question, answer, solution=solution)


@pytest.mark.parametrize(
  ("values", "paraphrase", "answer"),
  [
    ({}, "", ""),
    ({"paraphrase": "Two and two?"}, "Two and two?", ""),
    ({"paraphrase": "3 + 3?", "paraphrase_answer": 6}, "3 + 3?", "6"),
  ],
)
def test_paraphrases_are_optional_columns(values, paraphrase, answer):
  row = _row(question="2 + 2?", answer="4", **values)
  made = views.to_question(row, _DEFAULT)
  assert (made.paraphrase, made.paraphrase_answer) == (paraphrase, answer)
  own = dataclasses.replace(_DEFAULT, paraphrase="{other}")
  made = views.to_question(_row(other="x", **row.values), own)
  assert made.paraphrase == "x"


def test_nested_boxes_are_matched():
  values = {"question": "q", "answer": r"\boxed{1} \boxed{\frac{\sqrt{3}}{2}}"}
  fmt = dataclasses.replace(
    _DEFAULT, answer_pattern=_FORMATS["stratos"].answer_pattern
  )
  made = views.to_question(_row(**values), fmt)
  assert made.answer == r"\frac{\sqrt{3}}{2}"


def test_answer_without_a_match_yields_no_question():
  row = _row(question="q", answer="It is 4.")
  assert views.to_question(row, _FORMATS["gsm8k"]) is None


def test_arc_format_adds_its_system_prompt():
  system, *_ = views.to_messages(_row(**_ARC_SFT), _FORMATS["arc_atlas_v0"])
  assert system.role == "system"
  assert "Never give the answer away" in system.content


@pytest.mark.parametrize("trace", ["t", "\nt\n"])
def test_reasoning_trace_is_wrapped_in_front_of_the_solution(trace):
  row = _row(question="q", solution="s", reasoning_trace=trace)
  assert views.to_messages(row, _DEFAULT) == [
    types.Message("user", "q"),
    types.Message("assistant", "<think>\nt\n</think>\n\ns"),
  ]


def test_braces_in_a_row_are_not_expanded():
  row = _row(question="{solution}", solution="s {question}")
  assert views.to_messages(row, _DEFAULT) == [
    types.Message("user", "{solution}"),
    types.Message("assistant", "s {question}"),
  ]


@pytest.mark.parametrize("name", ["default", "guidance"])
def test_messages_are_used_as_they_are(name):
  row = _row(messages=_CHAT, question="other")
  fmt = dataclasses.replace(_FORMATS[name], system_prompt="p")
  assert views.to_messages(row, fmt) == [
    types.Message("system", "s"),
    types.Message("user", "q"),
    types.Message("assistant", "a"),
  ]
  row = _row(messages=_CHAT[1:])
  assert views.to_messages(row, fmt)[0] == types.Message("system", "p")


def test_guidance_without_messages_is_rejected():
  row = _row(question="q", probe="p", teaching="t")
  with pytest.raises(errors.DataError, match="question, probe, teaching"):
    views.to_messages(row, _FORMATS["guidance"])


def test_missing_column_is_reported():
  with pytest.raises(
    errors.DataError, match="Missing column: solution or ground_truth or answer"
  ):
    views.to_messages(_row(question="q"), _DEFAULT)


@pytest.mark.parametrize(
  ("messages", "why"),
  [
    ("hello", "Expected a list"),
    ([], "not empty"),
    (["hello"], "Turn 1"),
    ([*_CHAT, {"role": "tool", "content": "x"}], "Turn 4"),
    ([{"role": ["user"], "content": "x"}], "Turn 1"),
    ([{"role": "user"}], "NoneType"),
    ([{"role": "user", "content": 3}], "int 3"),
    ([{"role": "user", "content": " "}], "blank"),
  ],
)
def test_malformed_messages_are_reported_by_turn(messages, why):
  with pytest.raises(errors.DataError, match=why) as info:
    views.to_messages(_row(messages=messages), _DEFAULT)
  assert info.value.where == "train.jsonl:1"


def test_conversation_without_a_user_turn_is_rejected():
  row = _row(messages=[_CHAT[0], _CHAT[2]])
  for make in (views.to_question, views.to_problem):
    with pytest.raises(errors.DataError, match="user turn"):
      make(row, _DEFAULT)


def _turns(*contents):
  roles = ("user", "assistant") * len(contents)
  return [
    {"role": role, "content": content}
    for role, content in zip(roles, contents, strict=False)
  ]


def test_the_last_user_turn_is_the_question_with_earlier_turns_as_context():
  turns = _turns(
    "2+2?", "<think>\nHm.\n</think>\n\n4", "And 3+3?", "<think>t</think>6"
  )
  made = views.to_question(_row(messages=turns), _DEFAULT)
  assert made.question == "User: 2+2?\n\nAssistant: 4\n\nUser: And 3+3?"
  assert (made.answer, made.solution) == ("<think>t</think>6", "6")
  made = views.to_question(_row(messages=[_CHAT[0], *turns]), _DEFAULT)
  assert made.question.startswith("System: s\n\nUser: 2+2?\n\n")
  # Conversations that begin alike stay on one side of the held-out split.
  assert views.to_problem(_row(messages=turns), _DEFAULT) == "2+2?"


def test_a_conversation_that_ends_with_the_user_needs_an_answer_column():
  for turns in (_turns("q"), _turns("2+2?", "4", "And 3+3?")):
    with pytest.raises(errors.DataError, match="has no answer") as info:
      views.to_question(_row(messages=turns), _DEFAULT)
    assert "user" in info.value.why
    row = _row(messages=turns, answer="6")
    made = views.to_question(row, _DEFAULT)
    assert (made.answer, made.solution) == ("6", "")
    assert made.question.endswith(turns[-1]["content"])


def test_question_id_and_difficulty_are_read_from_columns():
  values = {"question": "q", "answer": "1", "id": 7, "difficulty": 0.5}
  assert views.to_question(_row(**values), _DEFAULT) == types.Question(
    "7", "q", "1", "0.5"
  )
  made = views.to_question(_row(**values, row_id="r"), _DEFAULT)
  assert made.row_id == "r"


def test_problems_are_identified_by_the_question():
  assert views.to_problem(_row(**_META), _FORMATS["meta_math"]) == (
    "What is half of 8?"
  )
  assert views.to_problem(_row(messages=_CHAT), _DEFAULT) == "q"
  row = _row(messages=_CHAT, question="the problem")
  assert views.to_problem(row, _DEFAULT) == "the problem"


def test_excluded_by_names_the_column():
  fmt = dataclasses.replace(_DEFAULT, keep={"level": (4, "5"), "kind": ("a",)})
  assert views.excluded_by(_row(level="4", kind="a"), fmt) == ""
  assert views.excluded_by(_row(level=5, kind="b"), fmt) == "kind"
  assert views.excluded_by(_row(kind="a"), fmt) == "level"


def test_arc_rows_have_the_shape_of_grpo_teachings():
  fmt = formats.find("arc_atlas_tags", "a.jsonl", arc_atlas.get_formats())
  row = _row(**_ARC_SFT)
  asked, answered = views.to_messages(row, fmt)
  assert asked.content == prompts.get_templates().teach.format(
    question="What is 2 + 2?", probe="I multiply."
  )
  assert answered.content == (
    "<thinking>\nIt confuses the signs.\n</thinking>\n"
    "<teaching>\nWhat does + ask for?\n</teaching>"
  )
  assert views.to_problem(row, fmt) == "What is 2 + 2?"
