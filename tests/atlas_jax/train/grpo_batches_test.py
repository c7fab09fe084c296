# SPDX-License-Identifier: Apache-2.0
"""Which weights wrote a step's batch, and when it was sampled."""

import dataclasses
import json
import threading

import pytest

from atlas_jax import errors, types
from atlas_jax.data import loader
from atlas_jax.teaching import protocol, templates
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


def _collector(tokenizer, write=None, **changes):
  """Makes a collector over two fakes; gives the policy's as well."""
  write = write or (lambda *_: "<teaching>add</teaching>")
  policy = fakes.FakeSampler(tokenizer, write)
  student = fakes.FakeSampler(tokenizer, lambda *_: "3")
  params = types.SamplingParams(1, 64, 1.0, 1.0, 0, 0)
  roles = (protocol.Role(s, tokenizer) for s in (policy, student))
  made = protocol.Protocol(
    *roles,
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


def _run(collector, steps):
  """Steps as training does; gives each step's batch."""
  taken = {}
  with collector:
    for step in steps:
      collector.push({}, step)
      taken[step], _ = collector.take(step, clock.Clock())
      collector.settle()  # Leaving the context may cancel what did not start.
  return taken


def _versions(records):
  return {r.teacher_rollout.completion.version for r in records}


def _what(records):
  return [(r.question.row_id, r.teacher_rollout.prompt) for r in records]


def test_without_overlap_every_batch_is_by_its_own_weights(tokenizer):
  collector, _ = _collector(tokenizer, max_staleness=0, compare_every=1)
  for step, records in _run(collector, range(4)).items():
    assert _versions(records) == {step}


def test_with_overlap_batches_are_one_step_old_but_for_compared_ones(tokenizer):
  collector, _ = _collector(tokenizer)
  taken = _run(collector, range(8))
  lags = [step - min(_versions(records)) for step, records in taken.items()]
  assert lags == [0, 1, 1, 1, 0, 1, 1, 1]


def test_overlap_changes_neither_questions_nor_seeds(tokenizer):
  ahead, sampler = _collector(tokenizer, num_steps=4)
  in_time, other = _collector(tokenizer, num_steps=4, max_staleness=0)
  taken, expected = _run(ahead, range(4)), _run(in_time, range(4))
  assert [*map(_what, taken.values())] == [*map(_what, expected.values())]
  for each in (sampler, other):
    assert [params.seed for _, params in each.calls] == [0, 1, 2, 3]


def test_resumed_run_samples_the_same_questions_in_time(tokenizer):
  whole, _ = _collector(tokenizer)
  resumed, _ = _collector(tokenizer)
  expected, taken = _run(whole, range(4)), _run(resumed, [2, 3])
  assert _versions(taken[2]) == {2}
  assert _what(taken[2]) == _what(expected[2])
  assert _what(taken[3]) == _what(expected[3])


def test_resumed_run_has_the_batch_that_was_under_way(tokenizer):
  collector, _ = _collector(tokenizer)
  with collector:
    collector.push({}, 1)
    collector.take(1, clock.Clock())
    state = json.loads(json.dumps(collector.get_state()))
    collector.push({}, 2)
    expected = collector.take(2, clock.Clock())
  resumed, sampler = _collector(tokenizer)
  resumed.set_state(state)
  with resumed:
    resumed.push({}, 2)
    assert resumed.take(2, clock.Clock()) == expected
    resumed.settle()
  assert _versions(expected[0]) == {1}
  assert [params.seed for _, params in sampler.calls] == [3]


def test_a_batch_that_failed_is_no_part_of_the_state(tokenizer):
  collector, policy = _collector(tokenizer, max_dropped_fraction=0.0)
  with collector:
    collector.push({}, 1)
    policy.given_up = {f"{row_id}/teach" for row_id in collector.row_ids(2)}
    collector.take(1, clock.Clock())
    assert collector.get_state()["ahead"] == []


def test_next_batch_is_sampled_while_this_one_trains(tokenizer):
  sampling, go_on = threading.Event(), threading.Event()

  def write(*_):
    if threading.current_thread() is not threading.main_thread():
      sampling.set()
      assert go_on.wait(20)
    return "<teaching>add</teaching>"

  collector, policy = _collector(tokenizer, write)
  with collector:
    collector.push({}, 0)
    collector.take(0, clock.Clock())
    assert sampling.wait(20)  # It is under way, and this thread is free.
    threading.Timer(0.2, go_on.set).start()
    collector.push({}, 1)  # New weights wait for it.
    assert policy.version == 1
    records, _ = collector.take(1, clock.Clock())
    assert _versions(records) == {0}


def test_nothing_is_sampled_past_the_last_step(tokenizer):
  collector, sampler = _collector(tokenizer, num_steps=2)
  _run(collector, range(2))
  assert len(sampler.calls) == 2


def test_failure_of_a_batch_ahead_shows_at_its_step(tokenizer):
  def write(*_):
    if threading.current_thread() is not threading.main_thread():
      raise errors.RolloutError("Gone.", where="a", why="b", fix="c")
    return "<teaching>add</teaching>"

  collector, _ = _collector(tokenizer, write)
  with collector:
    collector.push({}, 0)
    collector.take(0, clock.Clock())
    collector.settle()
    collector.push({}, 1)
    with pytest.raises(errors.RolloutError, match="Gone"):
      collector.take(1, clock.Clock())


def test_a_failure_of_training_hides_behind_none_of_sampling(tokenizer):
  go_on = threading.Event()

  def write(*_):
    if threading.current_thread() is not threading.main_thread():
      assert go_on.wait(20)
      raise errors.RolloutError("Gone.", where="a", why="b", fix="c")
    return "<teaching>add</teaching>"

  before = set(threading.enumerate())
  collector, _ = _collector(tokenizer, write)

  def train():
    with collector:
      collector.push({}, 0)
      collector.take(0, clock.Clock())  # The next batch is under way.
      go_on.set()
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


def test_what_is_too_old_is_dropped_and_counted(tokenizer):
  collector, _ = _collector(tokenizer)
  records = _run(collector, [0])[0]
  records = _with_versions(records, [5, 4, 3, 5])
  rewards = [types.Reward(1.0, parts={"correctness": 1.0})] * 4
  kept, metrics = collector.drop_stale(records, rewards, 5)
  assert [r.value for r in kept] == [1.0, 1.0, None, 1.0]
  assert kept[2].missing_reason == grpo_batches.STALE
  assert metrics["rollout/stale_dropped"] == 1
  assert metrics["rollout/staleness"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("versions", [[3, 3, 3, 3], [5, 5, 5, 6]])
def test_a_sampler_of_other_weights_is_refused(tokenizer, versions):
  collector, _ = _collector(tokenizer)
  records = _with_versions(_run(collector, [0])[0], versions)
  with pytest.raises(RuntimeError, match="does not hold the pushed weights"):
    collector.drop_stale(records, [types.Reward(1.0)] * 4, 5)


@pytest.mark.parametrize(
  "settings",
  [
    {"max_staleness": 2},
    {"max_staleness": 1, "compare_every": 1},
    {"max_staleness": 0, "compare_every": 0},
  ],
)
def test_settings_that_would_be_ignored_are_refused(tokenizer, settings):
  with pytest.raises(errors.ConfigError, match="overlap"):
    _collector(tokenizer, **settings)


def test_a_refill_asks_what_was_not_asked_until_nothing_is_left(tokenizer):
  collector, _ = _collector(tokenizer, max_staleness=0, compare_every=1)

  def refilled(step):
    records, _ = collector.take(step, clock.Clock())
    rounds = []
    for num_questions in (1, 3, 4, 2):
      more = collector.refill(
        step, records, num_questions=num_questions, clock=clock.Clock()
      )
      rounds.append({record.question.row_id for record in more})
      records += more
    return rounds

  with collector:
    collector.push({}, 0)
    rounds = refilled(0)
    assert rounds == refilled(0)  # A resumed run does the same.
    # All are logged, also while the next step is under way.
    collector.take(1, clock.Clock())
    row_ids = collector.row_ids(0)
    assert set(row_ids[2:]) == set.union(*rounds)
    assert len(set(row_ids)) == 8
  # Eight questions, of which the batch had two.
  assert [len(ids) for ids in rounds] == [1, 3, 2, 0]
  assert len(set.union(*rounds)) == 6


def test_a_refill_waits_for_what_is_sampled_ahead(tokenizer):
  started, may_end = threading.Event(), threading.Event()

  def write(*_):
    if collector.is_ahead:
      started.set()
      assert may_end.wait(10.0)
    return "<teaching>add</teaching>"

  collector, _ = _collector(tokenizer, write)
  collector.is_ahead = False
  with collector:
    collector.push({}, 0)
    records, _ = collector.take(0, clock.Clock())
    collector.settle()
    collector.push({}, 1)
    collector.is_ahead = True
    collector.take(1, clock.Clock())  # Samples the batch of step 2 ahead.
    assert started.wait(10.0)
    collector.is_ahead = False
    may_end.set()
    more = collector.refill(1, records, num_questions=1, clock=clock.Clock())
  assert _versions(more) == {1}


@pytest.mark.parametrize("step", [0, 1])
def test_what_is_dropped_in_time_or_ahead_is_counted_and_bounded(
  tokenizer, step
):
  def taken(*indices, **changes):
    collector, policy = _collector(tokenizer, **changes)
    row_ids = collector.row_ids(step)
    policy.given_up = {f"{row_ids[i]}/teach" for i in indices}
    with collector:
      for number in range(step + 1):
        collector.push({}, number)
        records, metrics = collector.take(number, clock.Clock())
        collector.settle()
    return row_ids, records, metrics["groups/dropped_fraction"]

  assert taken()[2] == 0.0
  row_ids, records, fraction = taken(0)
  assert [r.question.row_id for r in records] == [row_ids[1]] * 2
  assert fraction == 0.5
  with pytest.raises(errors.RolloutError, match="1 of 2 questions"):
    taken(0, max_dropped_fraction=0.25)
  with pytest.raises(errors.RolloutError, match="2 of 2 questions"):
    taken(0, 1)


def test_a_refill_of_which_nothing_comes_is_none(tokenizer):
  collector, policy = _collector(tokenizer, max_staleness=0, compare_every=1)
  with collector:
    collector.push({}, 0)
    records, _ = collector.take(0, clock.Clock())
    policy.given_up = {f"{q.row_id}/teach" for q in _QUESTIONS}
    refill = collector.refill(0, records, num_questions=1, clock=clock.Clock())
  assert refill == []
