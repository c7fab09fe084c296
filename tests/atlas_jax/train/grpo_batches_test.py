# SPDX-License-Identifier: Apache-2.0
"""Tests which weights sample a step's batch, and when."""

import dataclasses
import json
import threading

import pytest

from atlas_jax import errors, types
from atlas_jax.data import loader
from atlas_jax.teaching import protocol, roles, templates
from atlas_jax.train import grpo_batches
from atlas_jax.train.telemetry import clock
from tests import fakes

_QUESTIONS = [
  types.Question(
    row_id=f"q{i}", question=f"What is {i} + 1?", answer=f"{i + 1}"
  )
  for i in range(8)
]


@pytest.fixture
def tokenizer(tmp_path):
  return fakes.write_tokenizer(tmp_path)


def _batches(tokenizer, write=None, **changes):
  """Returns batches over two fake samplers, and the policy's sampler."""
  write = write or (lambda *_: "<teaching>add</teaching>")
  policy = fakes.FakeSampler(tokenizer, write)
  student = fakes.FakeSampler(tokenizer, lambda *_: "3")
  params = types.SamplingParams(1, 64, 1.0, 1.0, 0, 0)
  both = (roles.Role(s, tokenizer) for s in (policy, student))
  made = protocol.Protocol(
    *both,
    templates.Templates(
      "{question}", "{question}{probe}", "{question}{teaching}", "{question}"
    ),
    probe_params=params,
    teach_params=dataclasses.replace(params, group_size=2),
    solve_params=params,
    baseline_params=params,
  )
  questions = loader.QuestionLoader(
    _QUESTIONS, mix=loader.Mix((len(_QUESTIONS),), (), seed=0), batch_size=2
  )
  settings = dict(seed=0, num_steps=8, max_staleness=1, compare_every=4)
  settings["max_dropped_fraction"] = 0.5
  return grpo_batches.RolloutBatches(
    made, questions, **{**settings, **changes}
  ), policy


def _run(batches, steps):
  """Steps as training does; returns each step's batch."""
  taken = {}
  with batches:
    for step in steps:
      batches.push({}, step)
      taken[step], _ = batches.take(step, clock.Clock())
      batches.settle()  # Leaving the context may cancel pending work.
  return taken


def _versions(records):
  return {r.teacher_rollout.completion.version for r in records}


def _prompts(records):
  return [(r.question.row_id, r.teacher_rollout.prompt) for r in records]


def test_without_overlap_every_batch_uses_current_weights(tokenizer):
  batches, _ = _batches(tokenizer, max_staleness=0, compare_every=1)
  for step, records in _run(batches, range(4)).items():
    assert _versions(records) == {step}


def test_with_overlap_batches_are_one_step_old_unless_compared(tokenizer):
  batches, _ = _batches(tokenizer)
  taken = _run(batches, range(8))
  lags = [step - min(_versions(records)) for step, records in taken.items()]
  assert lags == [0, 1, 1, 1, 0, 1, 1, 1]


def test_overlap_changes_neither_questions_nor_seeds(tokenizer):
  ahead, sampler = _batches(tokenizer, num_steps=4)
  in_time, other = _batches(tokenizer, num_steps=4, max_staleness=0)
  taken, expected = _run(ahead, range(4)), _run(in_time, range(4))
  assert [*map(_prompts, taken.values())] == [*map(_prompts, expected.values())]
  for each in (sampler, other):
    assert [params.seed for _, params in each.calls] == [0, 1, 2, 3]


def test_resumed_run_samples_the_same_questions(tokenizer):
  whole, _ = _batches(tokenizer)
  resumed, _ = _batches(tokenizer)
  expected, taken = _run(whole, range(4)), _run(resumed, [2, 3])
  assert _versions(taken[2]) == {2}
  assert _prompts(taken[2]) == _prompts(expected[2])
  assert _prompts(taken[3]) == _prompts(expected[3])


def test_resumed_run_restores_the_batch_sampled_ahead(tokenizer):
  batches, _ = _batches(tokenizer)
  with batches:
    batches.push({}, 1)
    batches.take(1, clock.Clock())
    state = json.loads(json.dumps(batches.get_state()))
    batches.push({}, 2)
    expected = batches.take(2, clock.Clock())
  resumed, sampler = _batches(tokenizer)
  resumed.set_state(state)
  with resumed:
    resumed.push({}, 2)
    assert resumed.take(2, clock.Clock()) == expected
    resumed.settle()
  assert _versions(expected[0]) == {1}
  assert [params.seed for _, params in sampler.calls] == [3]


def test_a_failed_batch_is_not_saved_in_the_state(tokenizer):
  batches, policy = _batches(tokenizer, max_dropped_fraction=0.0)
  with batches:
    batches.push({}, 1)
    policy.given_up = {f"{row_id}/teach" for row_id in batches.row_ids(2)}
    batches.take(1, clock.Clock())
    assert batches.get_state()["ahead"] == []


def test_next_batch_is_sampled_while_this_one_trains(tokenizer):
  sampling, resume = threading.Event(), threading.Event()

  def write(*_):
    if threading.current_thread() is not threading.main_thread():
      sampling.set()
      assert resume.wait(20)
    return "<teaching>add</teaching>"

  batches, policy = _batches(tokenizer, write)
  with batches:
    batches.push({}, 0)
    batches.take(0, clock.Clock())
    assert sampling.wait(20)  # Sampling runs in its own thread.
    threading.Timer(0.2, resume.set).start()
    batches.push({}, 1)  # Waits for the batch in progress.
    assert policy.version == 1
    records, _ = batches.take(1, clock.Clock())
    assert _versions(records) == {0}


def test_nothing_is_sampled_past_the_last_step(tokenizer):
  batches, sampler = _batches(tokenizer, num_steps=2)
  _run(batches, range(2))
  assert len(sampler.calls) == 2


def test_an_error_while_sampling_ahead_is_raised_at_its_step(tokenizer):
  def write(*_):
    if threading.current_thread() is not threading.main_thread():
      raise errors.RolloutError("Gone.", where="a", why="b", fix="c")
    return "<teaching>add</teaching>"

  batches, _ = _batches(tokenizer, write)
  with batches:
    batches.push({}, 0)
    batches.take(0, clock.Clock())
    batches.settle()
    batches.push({}, 1)
    with pytest.raises(errors.RolloutError, match="Gone"):
      batches.take(1, clock.Clock())


def test_a_training_error_is_not_masked_by_a_sampling_error(tokenizer):
  resume = threading.Event()

  def write(*_):
    if threading.current_thread() is not threading.main_thread():
      assert resume.wait(20)
      raise errors.RolloutError("Gone.", where="a", why="b", fix="c")
    return "<teaching>add</teaching>"

  before = set(threading.enumerate())
  batches, _ = _batches(tokenizer, write)

  def train():
    with batches:
      batches.push({}, 0)
      batches.take(0, clock.Clock())  # Starts the next batch.
      resume.set()
      raise ZeroDivisionError

  with pytest.raises(ZeroDivisionError):
    train()
  assert set(threading.enumerate()) == before


def _with_versions(records, versions):
  def at(record, version):
    rollout = record.teacher_rollout
    completion = dataclasses.replace(rollout.completion, version=version)
    return dataclasses.replace(
      record,
      teacher_rollout=dataclasses.replace(rollout, completion=completion),
    )

  return [at(r, v) for r, v in zip(records, versions, strict=True)]


def test_stale_records_are_dropped_and_counted(tokenizer):
  batches, _ = _batches(tokenizer)
  records = _run(batches, [0])[0]
  records = _with_versions(records, [5, 4, 3, 5])
  rewards = [types.Reward(1.0, parts={"correctness": 1.0})] * 4
  kept, metrics = batches.drop_stale(records, rewards, 5)
  assert [r.value for r in kept] == [1.0, 1.0, None, 1.0]
  assert kept[2].missing_reason == grpo_batches.STALE
  assert metrics["rollout/stale_dropped"] == 1
  assert metrics["rollout/staleness"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("versions", [[3, 3, 3, 3], [5, 5, 5, 6]])
def test_a_sampler_with_other_weights_raises(tokenizer, versions):
  batches, _ = _batches(tokenizer)
  records = _with_versions(_run(batches, [0])[0], versions)
  with pytest.raises(RuntimeError, match="does not hold the pushed weights"):
    batches.drop_stale(records, [types.Reward(1.0)] * 4, 5)


@pytest.mark.parametrize(
  "settings",
  [
    {"max_staleness": 2},
    {"max_staleness": 1, "compare_every": 1},
    {"max_staleness": 0, "compare_every": 0},
  ],
)
def test_settings_that_would_be_ignored_raise(tokenizer, settings):
  with pytest.raises(errors.ConfigError, match="overlap"):
    _batches(tokenizer, **settings)


def test_refills_sample_unused_questions_until_none_are_left(tokenizer):
  batches, _ = _batches(tokenizer, max_staleness=0, compare_every=1)

  def refilled(step):
    records, _ = batches.take(step, clock.Clock())
    rounds = []
    for num_questions in (1, 3, 4, 2):
      more = batches.refill(
        step, records, num_questions=num_questions, clock=clock.Clock()
      )
      rounds.append({record.question.row_id for record in more})
      records += more
    return rounds

  with batches:
    batches.push({}, 0)
    rounds = refilled(0)
    assert rounds == refilled(0)  # A resumed run repeats them.
    # All row ids stay available while the next step is sampled.
    batches.take(1, clock.Clock())
    row_ids = batches.row_ids(0)
    assert set(row_ids[2:]) == set.union(*rounds)
    assert len(set(row_ids)) == 8
  # The batch uses two of the eight questions.
  assert [len(ids) for ids in rounds] == [1, 3, 2, 0]
  assert len(set.union(*rounds)) == 6


def test_a_refill_waits_for_the_batch_sampled_ahead(tokenizer):
  started, may_finish = threading.Event(), threading.Event()

  def write(*_):
    if batches.is_ahead:
      started.set()
      assert may_finish.wait(10.0)
    return "<teaching>add</teaching>"

  batches, _ = _batches(tokenizer, write)
  batches.is_ahead = False
  with batches:
    batches.push({}, 0)
    records, _ = batches.take(0, clock.Clock())
    batches.settle()
    batches.push({}, 1)
    batches.is_ahead = True
    batches.take(1, clock.Clock())  # Samples the batch of step 2 ahead.
    assert started.wait(10.0)
    batches.is_ahead = False
    may_finish.set()
    more = batches.refill(1, records, num_questions=1, clock=clock.Clock())
  assert _versions(more) == {1}


@pytest.mark.parametrize("step", [0, 1])
def test_dropped_groups_are_counted_and_bounded(tokenizer, step):
  def taken(*indices, **changes):
    batches, policy = _batches(tokenizer, **changes)
    row_ids = batches.row_ids(step)
    policy.given_up = {f"{row_ids[i]}/teach" for i in indices}
    with batches:
      for number in range(step + 1):
        batches.push({}, number)
        records, metrics = batches.take(number, clock.Clock())
        batches.settle()
    return row_ids, records, metrics["groups/dropped_fraction"]

  assert taken()[2] == 0.0
  row_ids, records, fraction = taken(0)
  assert [r.question.row_id for r in records] == [row_ids[1]] * 2
  assert fraction == 0.5
  with pytest.raises(errors.RolloutError, match="1 of 2 questions"):
    taken(0, max_dropped_fraction=0.25)
  with pytest.raises(errors.RolloutError, match="2 of 2 questions"):
    taken(0, 1)


def test_a_refill_without_completions_is_empty(tokenizer):
  batches, policy = _batches(tokenizer, max_staleness=0, compare_every=1)
  with batches:
    batches.push({}, 0)
    records, _ = batches.take(0, clock.Clock())
    policy.given_up = {f"{q.row_id}/teach" for q in _QUESTIONS}
    refill = batches.refill(0, records, num_questions=1, clock=clock.Clock())
  assert refill == []
