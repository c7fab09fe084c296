# SPDX-License-Identifier: Apache-2.0
"""Tests the prompts, order and caching of the teaching protocol."""

import dataclasses
import json
import threading

import pytest

from atlas_jax import chat, errors, types
from atlas_jax.rewards import grading
from atlas_jax.teaching import missing, roles, templates
from atlas_jax.teaching import protocol as teaching_protocol
from tests import fakes

_TEMPLATES = templates.Templates(
  probe="PROBE {question}",
  teach="TEACH {question} AFTER {probe}",
  taught="SOLVE {question} WITH {teaching}",
  baseline="SOLVE {question}",
)
_QUESTIONS = [
  types.Question("a", "1 + {probe}", "2"),
  types.Question("b", "2 + 2", "4"),
]


def _params(group_size, seed=5, max_completion_tokens=200):
  return types.SamplingParams(
    group_size=group_size,
    max_completion_tokens=max_completion_tokens,
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    seed=seed,
  )


def _student_writes(prompt, params, index):
  return f"{prompt.row_id} seed {params.seed} draw {index}"


def _policy_writes(prompt, params, index):
  del prompt, params
  return f"<thinking>secret</thinking><teaching>hint {index}</teaching>"


@pytest.fixture
def tokenizer(tmp_path):
  return fakes.write_tokenizer(tmp_path)


def _protocol(
  tokenizer,
  *,
  policy_writes=_policy_writes,
  student_writes=_student_writes,
  **overrides,
):
  params = {
    "probe_params": _params(1),
    "teach_params": _params(3),
    "solve_params": _params(2),
    "baseline_params": _params(2, seed=70),
  }
  policy = fakes.FakeSampler(tokenizer, policy_writes)
  student = fakes.FakeSampler(tokenizer, student_writes)
  return teaching_protocol.Protocol(
    roles.Role(policy, tokenizer),
    roles.Role(student, tokenizer),
    _TEMPLATES,
    **{**params, **overrides},
  )


def _rendered(tokenizer, text):
  return chat.render(tokenizer, [types.Message("user", text)])[0]


def test_each_role_gets_the_prompt_of_its_template(tokenizer):
  protocol = _protocol(tokenizer)
  protocol.run(_QUESTIONS, seed=7)

  baseline, probe, taught = (
    [prompt.text for prompt in prompts]
    for prompts, _ in protocol.student.sampler.calls
  )
  ((teach, _),) = protocol.policy.sampler.calls
  assert baseline == [
    _rendered(tokenizer, "SOLVE 1 + {probe}"),
    _rendered(tokenizer, "SOLVE 2 + 2"),
  ]
  assert probe[0] == _rendered(tokenizer, "PROBE 1 + {probe}")
  assert teach[1].text == _rendered(
    tokenizer, "TEACH 2 + 2 AFTER b/probe seed 7 draw 0"
  )
  assert taught[:4] == [
    *(
      _rendered(tokenizer, f"SOLVE 1 + {{probe}} WITH hint {i}")
      for i in range(3)
    ),
    _rendered(tokenizer, "SOLVE 2 + 2 WITH hint 0"),
  ]


def test_records_are_in_question_order_with_their_samples(tokenizer):
  protocol = _protocol(tokenizer)
  records = protocol.run(_QUESTIONS, seed=7)

  ((prompts, _),) = protocol.policy.sampler.calls
  assert [r.question.row_id for r in records] == ["a"] * 3 + ["b"] * 3
  for i, record in enumerate(records):
    assert record.teacher_rollout.prompt is prompts[i // 3]
    assert record.teaching == f"hint {i % 3}"
    assert record.completion_text == _policy_writes(None, None, i % 3)
    assert record.num_teaching_tokens == len(
      tokenizer.encode(record.teaching, add_special_tokens=False)
    )
    assert [a.text for a in record.taught] == [
      f"{record.question.row_id}/solve/{i % 3} seed 7 draw {j}"
      for j in range(2)
    ]
    assert [a.text for a in record.baseline] == [
      f"{record.question.row_id}/solve/0 seed 70 draw {j}" for j in range(2)
    ]
    assert record.taught[0].correct is None
    assert record.leaked is None
    assert record.reward is None
    assert record.seconds > 0
    types.to_json_line(record)


def test_row_ids_differ_within_every_call(tokenizer):
  protocol = _protocol(tokenizer)
  protocol.run(_QUESTIONS, seed=7)
  for sampler in (protocol.student.sampler, protocol.policy.sampler):
    for prompts, _ in sampler.calls:
      row_ids = [prompt.row_id for prompt in prompts]
      assert len(set(row_ids)) == len(row_ids)


def test_the_seed_is_used_in_every_phase_but_the_baseline(tokenizer):
  protocol = _protocol(tokenizer)
  protocol.run(_QUESTIONS, seed=7)
  seeds = [params.seed for _, params in protocol.student.sampler.calls]
  assert seeds == [70, 7, 7]
  assert protocol.policy.sampler.calls[0][1].seed == 7


def test_cached_baselines_are_not_sampled_again(tokenizer):
  protocol = _protocol(tokenizer)
  first = protocol.run(_QUESTIONS[:1], seed=1)
  calls = protocol.student.sampler.calls
  calls.clear()
  again = protocol.run(_QUESTIONS[:1], seed=2)
  assert len(calls) == 2
  assert again[0].baseline == first[0].baseline

  calls.clear()
  protocol.run(_QUESTIONS, seed=3)
  assert len(calls) == 3
  assert [p.row_id for p in calls[0][0]] == ["b/solve/0"]


@pytest.mark.parametrize("change", ["text", "weights"])
def test_a_baseline_is_not_reused_for_other_text_or_weights(tokenizer, change):
  protocol = _protocol(tokenizer)
  protocol.run(_QUESTIONS, seed=1)
  protocol.student.sampler.calls.clear()
  questions = _QUESTIONS
  if change == "text":
    questions = [dataclasses.replace(q, question="new") for q in _QUESTIONS]
  else:
    protocol.student.sampler.update_weights({}, 1)
  protocol.run(questions, seed=1)
  assert len(protocol.student.sampler.calls) == 3


def test_without_a_teaching_the_student_gets_the_baseline_prompt(tokenizer):
  protocol = _protocol(
    tokenizer,
    policy_writes=lambda *_: "<thinking>secret</thinking> no tag",
    teach_params=_params(1),
  )
  records = protocol.run(_QUESTIONS, seed=70)
  for record in records:
    assert record.teaching is None
    assert record.num_teaching_tokens == 0
    assert record.taught == record.baseline
  baseline, _, taught = protocol.student.sampler.calls
  assert taught == baseline


def test_truncation_is_kept(tokenizer):
  protocol = _protocol(
    tokenizer, solve_params=_params(1, max_completion_tokens=3)
  )
  record = protocol.run(_QUESTIONS, seed=7)[0]
  assert record.taught[0].finish_reason == "length"
  assert record.taught[0].num_tokens == 3
  assert record.baseline[0].finish_reason == "stop"


def test_no_questions_make_no_calls(tokenizer):
  protocol = _protocol(tokenizer)
  assert protocol.run([], seed=7) == []
  assert protocol.student.sampler.calls == []


def test_more_than_one_probe_is_rejected(tokenizer):
  with pytest.raises(errors.ConfigError, match=r"probe_params\.group_size"):
    _protocol(tokenizer, probe_params=_params(2))


_THREE = [*_QUESTIONS, types.Question("c", "3 + 3", "6")]


def _timeless(records):
  return [dataclasses.replace(record, seconds=0.0) for record in records]


@pytest.mark.parametrize("row_id", ["b/solve/0", "b/probe", "b/teach"])
def test_a_dropped_prompt_drops_its_question(tokenizer, row_id):
  whole = _timeless(_protocol(tokenizer).run(_THREE, seed=7))
  protocol = _protocol(tokenizer)
  samplers = (protocol.student.sampler, protocol.policy.sampler)
  for sampler in samplers:
    sampler.given_up = {row_id}
  records = _timeless(protocol.run(_THREE, seed=7))
  assert records == [r for r in whole if r.question.row_id != "b"]

  # Dropped prompts are not cached: the next run samples them again.
  for sampler in samplers:
    sampler.given_up = set()
  assert _timeless(protocol.run(_THREE, seed=7)) == whole


def test_a_dropped_taught_prompt_leaves_its_record_without_answers(tokenizer):
  whole = _timeless(_protocol(tokenizer).run(_THREE, seed=7))
  protocol = _protocol(tokenizer)
  protocol.student.sampler.given_up = {"b/solve/2"}
  records = _timeless(protocol.run(_THREE, seed=7))
  whole[5] = dataclasses.replace(whole[5], taught=())
  assert records == whole
  assert missing.fraction(_THREE, records, max_fraction=0.2) == pytest.approx(
    1 / 9
  )


def test_a_dropped_question_is_not_sampled_in_later_phases(tokenizer):
  protocol = _protocol(tokenizer)
  protocol.student.sampler.given_up = {"b/solve/0"}
  protocol.run(_THREE, seed=7)
  later = [*protocol.student.sampler.calls[1:], *protocol.policy.sampler.calls]
  sampled = {prompt.row_id for prompts, _ in later for prompt in prompts}
  assert not [row_id for row_id in sampled if row_id.startswith("b")]


def test_if_every_prompt_is_dropped_there_are_no_records(tokenizer):
  protocol = _protocol(tokenizer)
  protocol.policy.sampler.given_up = {f"{q.row_id}/teach" for q in _THREE}
  assert protocol.run(_THREE, seed=7) == []


def test_a_question_asked_twice_keeps_both_groups(tokenizer):
  records = _protocol(tokenizer).run([*_QUESTIONS, _QUESTIONS[0]], seed=7)
  assert [r.question.row_id for r in records] == [*"aaabbbaaa"]


def test_the_fraction_of_dropped_questions_is_bounded(tokenizer):
  protocol = _protocol(tokenizer)
  protocol.policy.sampler.given_up = {"b/teach"}
  records = protocol.run(_THREE, seed=7)

  def fraction(records, max_fraction):
    return missing.fraction(_THREE, records, max_fraction=max_fraction)

  assert fraction(records, 1 / 3) == 1 / 3
  with pytest.raises(errors.RolloutError, match="1 of 3 questions") as caught:
    fraction(records, 0.3)
  assert caught.value.where == "rows b"
  assert caught.value.exit_code == errors.Exit.ROLLOUT
  with pytest.raises(errors.RolloutError, match="rows a, b, c"):
    fraction([], 0.99)


def test_baselines_are_restored_if_their_settings_are_unchanged(tokenizer):
  first = _protocol(tokenizer)
  records = grading.by_rules().grade(first.run(_QUESTIONS[:1], seed=7))
  first.keep_baselines(records)
  state = json.loads(json.dumps(first.get_state()))

  def num_sampled(**changes):
    resumed = _protocol(tokenizer, **changes)
    resumed.set_state(state)
    again = resumed.run(_QUESTIONS, seed=8)
    if changes.get("baseline_params") is None:
      grades = [dataclasses.replace(a, text="") for a in records[0].baseline]
      assert list(again[0].baseline) == grades
    return len(resumed.student.sampler.calls[0][0])

  assert num_sampled() == 1
  assert num_sampled(teach_params=_params(2)) == 1
  other = dataclasses.replace(_params(2, seed=70), top_p=0.5)
  assert num_sampled(baseline_params=other) == 2


def test_concurrent_samplers_give_the_same_records(tokenizer):
  whole = _timeless(_protocol(tokenizer).run(_THREE, seed=7))
  protocol = _protocol(tokenizer)
  for role in protocol.roles.values():
    role.sampler.is_concurrent = True
  assert _timeless(protocol.run(_THREE, seed=7)) == whole


def test_a_question_does_not_wait_for_the_probes_of_others(tokenizer):
  """Question a is taught before question b has its probe."""
  is_a_taught = threading.Event()

  def student_writes(prompt, *_):
    if prompt.row_id == "b/probe":
      assert is_a_taught.wait(timeout=60)
    if prompt.row_id == "a/solve/2":
      is_a_taught.set()
    return "text"

  protocol = _protocol(tokenizer, student_writes=student_writes)
  for role in protocol.roles.values():
    role.sampler.is_concurrent = True
  assert len(protocol.run(_QUESTIONS, seed=7)) == 6


def test_the_failure_of_a_concurrent_sampler_is_raised(tokenizer):
  def student_writes(prompt, *_):
    if prompt.row_id == "b/probe":
      raise errors.RolloutError("Lost.", where="", why="", fix="")
    return "text"

  protocol = _protocol(tokenizer, student_writes=student_writes)
  for role in protocol.roles.values():
    role.sampler.is_concurrent = True
  with pytest.raises(errors.RolloutError, match="Lost"):
    protocol.run(_THREE, seed=7)


def test_the_state_of_a_question_is_small(tokenizer):
  def student_writes(*_):
    return "reasoning " * 2000 + "The answer is 2."

  protocol = _protocol(
    tokenizer,
    student_writes=student_writes,
    baseline_params=_params(4, max_completion_tokens=100_000),
  )
  question = types.Question("a", "long " * 1000, "2")
  records = grading.by_rules().grade(protocol.run([question], seed=7))
  # Before grading, its answers belong to a batch sampled ahead.
  assert not protocol.get_state()["baselines"]
  protocol.keep_baselines(records)
  assert len(json.dumps(protocol.get_state()["baselines"])) < 400
