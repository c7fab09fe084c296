# SPDX-License-Identifier: Apache-2.0
"""One process samples from servers, and all get the same completions."""

import json

import pytest

from atlas_jax import types
from rollout.remote import shared_sampler

_PARAMS = types.SamplingParams(2, 4, 1.0, 1.0, 0, 0)
_PROMPTS = [types.Prompt("a", "x", (1,)), types.Prompt("b", "y", (2, 3))]


class _Asked:
  """A sampler that counts its calls and drops the second prompt."""

  version, context_length, is_concurrent = -1, 99, True

  def __init__(self):
    self.num_calls = 0

  def sample(self, prompts, params):
    del prompts, params
    self.num_calls += 1
    drawn = types.Completion((5, 6), (-0.1, -1 / 3), (-0.1,), "stop", 4)
    return [[drawn, drawn], []]

  def update_weights(self, params, version):
    del params
    self.version = version

  def take_metrics(self):
    return {"requests": 1.0}


@pytest.fixture
def pair():
  """Returns the samplers of two processes, and the one they share."""
  broadcast = []

  def first(make):
    broadcast.append(json.dumps(make()))
    return json.loads(broadcast[-1])

  def other(make):
    del make  # Runs in the first process only.
    return json.loads(broadcast[-1])

  asked = _Asked()
  taken = []
  leader = shared_sampler.SharedSampler(
    asked, first, update_weights=asked.update_weights
  )
  follower = shared_sampler.SharedSampler(
    None, other, update_weights=lambda _, version: taken.append(version)
  )
  return leader, follower, asked, taken


def test_the_first_process_samples_once_and_all_get_the_same(pair):
  leader, follower, asked, _ = pair
  got = leader.sample(_PROMPTS, _PARAMS)
  assert got == asked.sample(_PROMPTS, _PARAMS)
  assert follower.sample(_PROMPTS, _PARAMS) == got
  assert asked.num_calls == 2  # One call is by this test.


def test_all_processes_publish_weights(pair):
  leader, follower, asked, taken = pair
  assert leader.version == follower.version == -1
  assert leader.context_length == follower.context_length == 99
  for each in (leader, follower):
    each.update_weights({}, 7)
  assert asked.version == leader.version == follower.version == 7
  assert taken == [7]


def test_metrics_are_those_of_the_first_process(pair):
  leader, follower, _, _ = pair
  assert leader.take_metrics() == {"requests": 1.0}
  assert follower.take_metrics() == {}
