# SPDX-License-Identifier: Apache-2.0
"""Tests the teaching protocol of several processes, which are simulated."""

import dataclasses
import json

import pytest

from atlas_jax import types
from atlas_jax.rewards import grading
from atlas_jax.teaching import protocol, roles, shared, templates
from tests import fakes

_TEMPLATES = templates.Templates(
  probe="PROBE {question}",
  teach="TEACH {question} AFTER {probe}",
  taught="SOLVE {question} WITH {teaching}",
  baseline="SOLVE {question}",
)
_QUESTIONS = [types.Question("a", "1 + 1", "2"), types.Question("b", "0", "0")]
_PARAMS = types.SamplingParams(
  group_size=1,
  max_completion_tokens=200,
  temperature=1.0,
  top_p=1.0,
  top_k=0,
  seed=5,
)
_PHASES = {
  f"{phase}_params": _PARAMS
  for phase in ("probe", "teach", "solve", "baseline")
}


def _role(tokenizer, text):
  sampler = fakes.FakeSampler(tokenizer, lambda *_: text)
  sampler.is_concurrent = True
  return roles.Role(sampler, tokenizer)


def test_all_processes_get_the_records_of_the_first(tmp_path):
  tokenizer = fakes.write_tokenizer(tmp_path)
  policy = _role(tokenizer, "<teaching>t</teaching>")
  student = _role(tokenizer, "The answer is 2.")
  broadcast = []

  def first(make):
    broadcast.append(json.dumps(make()))
    return json.loads(broadcast[-1])

  def create(samplers, from_first):
    # The samplers that all processes call must not be used.
    unused = dataclasses.replace(policy, sampler=None)
    return shared.SharedProtocol(
      unused,
      unused,
      _TEMPLATES,
      samplers=samplers,
      from_first=from_first,
      **_PHASES,
    )

  leader = create((policy.sampler, student.sampler), first)
  follower = create((None, None), lambda _: json.loads(broadcast[-1]))
  records = leader.run(_QUESTIONS, seed=7)
  assert records == follower.run(_QUESTIONS, seed=7)
  alone = protocol.Protocol(policy, student, _TEMPLATES, **_PHASES)
  assert [dataclasses.replace(r, seconds=0.0) for r in records] == [
    dataclasses.replace(r, seconds=0.0) for r in alone.run(_QUESTIONS, seed=7)
  ]

  graded = grading.by_rules().grade(records)
  for each in (leader, follower):
    each.keep_baselines(graded)
  state = leader.get_state()
  assert len(state["baselines"]) == 2
  leader.set_state(state)
  follower.set_state(state)
  with pytest.raises(RuntimeError, match="first process"):
    create((None, None), first).run(_QUESTIONS, seed=7)
