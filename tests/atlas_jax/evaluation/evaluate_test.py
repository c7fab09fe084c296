# SPDX-License-Identifier: Apache-2.0
"""Tests that an interrupted evaluation resumes to the same records."""

import dataclasses
import json

import pytest

from atlas_jax import errors, types
from atlas_jax.evaluation import evaluate
from atlas_jax.rewards import grading
from atlas_jax.teaching import protocol as teaching_protocol
from atlas_jax.teaching import roles, templates
from configs.data import prompts
from tests import fakes

_QUESTIONS = [
  types.Question(
    f"q{i}",
    f"What is {i} + 40?",
    str(i + 40),
    paraphrase=f"Add {i} to 40." if i % 2 else "",
  )
  for i in range(5)
]
_WEIGHTS = {"policy": "teacher-a", "student": "student"}


def _params(group_size):
  return types.SamplingParams(
    group_size=group_size,
    max_completion_tokens=200,
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    seed=0,
  )


def _student_writes(prompt, params, index):
  del params, index
  number = int(prompt.row_id[1])
  right = "hint 1" in prompt.text
  return f"<solution>{number + 40 if right else number}</solution>"


def _policy_writes(prompt, params, index):
  del prompt, params
  return f"<teaching>hint {index}</teaching>"


@pytest.fixture
def protocol(tmp_path):
  tokenizer = fakes.write_tokenizer(tmp_path / "tokenizer")
  return teaching_protocol.Protocol(
    roles.Role(fakes.FakeSampler(tokenizer, _policy_writes), tokenizer),
    roles.Role(fakes.FakeSampler(tokenizer, _student_writes), tokenizer),
    templates.Templates(**prompts.get_templates()),
    probe_params=_params(1),
    teach_params=_params(2),
    solve_params=_params(1),
    baseline_params=_params(1),
  )


def _run(protocol, path, **overrides):
  arguments = {
    "questions": _QUESTIONS,
    "grader": grading.by_rules(),
    "batch_size": 2,
    "seed": 1,
    "weights": _WEIGHTS,
    "should_stop": lambda: False,
    "from_first": lambda make: make(),
    **overrides,
  }
  return evaluate.run(protocol, path=path, **arguments)


def _timeless(records):
  return [dataclasses.replace(record, seconds=0.0) for record in records]


def test_records_are_graded_and_read_back_unchanged(protocol, tmp_path):
  path = tmp_path / "new" / "records.jsonl"
  records = _run(protocol, path)
  assert [r.question.row_id for r in records] == [
    f"q{i}" for i in range(5) for _ in range(2)
  ]
  assert [r.taught[0].correct for r in records] == [False, True] * 5
  assert not any(r.leaked for r in records)
  paraphrased = [[a.correct for a in r.paraphrased] for r in records]
  assert paraphrased == ([[], [], [False], [True]] * 3)[:10]
  assert evaluate.read(path) == records


def test_records_without_paraphrases_of_older_files_are_read(
  protocol, tmp_path
):
  path = tmp_path / "records.jsonl"
  questions = [_QUESTIONS[0]]
  records = _run(protocol, path, questions=questions)
  header, *lines = path.read_text().splitlines()
  old = [json.loads(line) for line in lines]
  for fields in old:
    del fields["paraphrased"]
    del (
      fields["question"]["paraphrase"],
      fields["question"]["paraphrase_answer"],
    )
  path.write_text("\n".join([header, *map(json.dumps, old)]))
  assert evaluate.read(path) == records


def test_a_truncated_file_is_resumed_to_the_same_records(protocol, tmp_path):
  whole_path, path = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
  whole = _timeless(_run(protocol, whole_path))
  raw = whole_path.read_bytes()
  num_header = raw.index(b"\n")
  middle = len(raw) // 2
  for size in (0, 10, num_header, num_header + 1, middle, len(raw) - 1):
    path.write_bytes(raw[:size])
    assert _timeless(_run(protocol, path)) == whole, size
    assert _timeless(evaluate.read(path)) == whole, size


def test_a_stop_between_batches_is_resumed(protocol, tmp_path):
  whole = _timeless(_run(protocol, tmp_path / "whole.jsonl"))
  path = tmp_path / "records.jsonl"
  answers = iter([False, True])
  with pytest.raises(errors.PreemptedError, match="after 2 of 5 questions"):
    _run(protocol, path, should_stop=lambda: next(answers))
  assert len(evaluate.read(path)) == 4
  assert _timeless(_run(protocol, path)) == whole


def test_finished_questions_are_not_sampled_again(protocol, tmp_path):
  path = tmp_path / "records.jsonl"
  _run(protocol, path)
  protocol.policy.sampler.calls.clear()
  _run(protocol, path, batch_size=3)
  assert protocol.policy.sampler.calls == []

  # A question with only some of its teachings is sampled again.
  lines = path.read_bytes().splitlines(keepends=True)
  path.write_bytes(b"".join(lines[: 1 + 7]))
  _run(protocol, path)
  sampled = [
    p.row_id for prompts, _ in protocol.policy.sampler.calls for p in prompts
  ]
  assert sampled == ["q3/teach", "q4/teach"]


@pytest.mark.parametrize(
  ("overrides", "name"),
  [
    ({"seed": 2}, "seed"),
    ({"grader": grading.Grader(lambda _: [], None)}, "math_verify"),
    ({"questions": _QUESTIONS[:4]}, "questions"),
    ({"weights": {**_WEIGHTS, "policy": "teacher-b"}}, "weights"),
  ],
)
def test_records_of_other_settings_are_rejected_and_kept(
  protocol, tmp_path, overrides, name
):
  path = tmp_path / "records.jsonl"
  _run(protocol, path)
  raw = path.read_bytes()
  with pytest.raises(errors.ConfigError, match=f"differ: {name}"):
    _run(protocol, path, **overrides)
  assert path.read_bytes() == raw


def test_records_of_another_version_role_or_template_are_rejected(
  protocol, tmp_path
):
  path = tmp_path / "records.jsonl"
  _run(protocol, path)
  protocol.policy.sampler.update_weights({}, 3)
  protocol.templates = dataclasses.replace(
    protocol.templates, baseline="{question}"
  )
  protocol.student = dataclasses.replace(protocol.student, max_prompt_tokens=99)
  with pytest.raises(errors.ConfigError, match="roles, templates, versions"):
    _run(protocol, path)


@pytest.mark.parametrize("text", ["my notes", "my notes\n", '{"a": 1}\n'])
def test_a_file_with_other_content_is_not_modified(protocol, tmp_path, text):
  path = tmp_path / "notes.txt"
  path.write_text(text)
  with pytest.raises(errors.ConfigError, match="not an evaluation header"):
    _run(protocol, path)
  assert path.read_text() == text


@pytest.mark.parametrize("line", ["{}", "[]", "not json", '{"question": 1}'])
def test_an_invalid_line_is_reported_by_number(protocol, tmp_path, line):
  path = tmp_path / "records.jsonl"
  _run(protocol, path)
  lines = path.read_text().splitlines()
  lines[2] = line
  path.write_text("\n".join(lines) + "\n")
  for attempt in (lambda: _run(protocol, path), lambda: evaluate.read(path)):
    with pytest.raises(errors.DataError, match="Line 3"):
      attempt()


def test_the_batch_size_changes_no_record(protocol, tmp_path):
  one = _run(protocol, tmp_path / "one.jsonl", batch_size=1)
  all_at_once = _run(protocol, tmp_path / "all.jsonl", batch_size=99)
  assert _timeless(one) == _timeless(all_at_once)
  header = (tmp_path / "one.jsonl").read_text().splitlines()[0]
  assert "batch_size" not in json.loads(header)["settings"]


def test_repeated_row_ids_are_rejected(protocol, tmp_path):
  with pytest.raises(errors.DataError, match="q0"):
    _run(protocol, tmp_path / "x", questions=[_QUESTIONS[0]] * 2)


def test_a_dropped_prompt_stops_the_run_and_the_next_run_retries(
  protocol, tmp_path
):
  whole = _timeless(_run(protocol, tmp_path / "whole.jsonl"))
  path = tmp_path / "records.jsonl"
  protocol.policy.sampler.given_up = {"q3/teach"}
  with pytest.raises(errors.RolloutError, match="rows q3"):
    _run(protocol, path)
  assert _timeless(evaluate.read(path)) == whole[:4]
  protocol.policy.sampler.given_up = set()
  assert _timeless(_run(protocol, path)) == whole
