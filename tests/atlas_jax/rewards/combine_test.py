# SPDX-License-Identifier: Apache-2.0
"""Tests weighted sums of rewards."""

import math

import pytest

from atlas_jax import errors, types
from atlas_jax.rewards import combine, custom
from configs.reward import teaching

_NONE = custom.parse((), timeout_s=1.0, memory_gb=0.0)


def _fixed(*rewards):
  return lambda _: list(rewards)


def _open(functions=_NONE, **weights):
  config = teaching.get_config()
  config.weights.teaching = 0.0
  config.weights.update(weights)
  return combine.open_reward(
    **config, functions=functions, student=None, max_tokens=200
  )


def test_the_sum_is_weighted_and_the_parts_are_not():
  reward_fn = combine.weighted(
    {
      "a": (2.0, _fixed(types.Reward(3.0, parts={"x": 1.0, "y": 2.0}))),
      "b": (-0.5, _fixed(types.Reward(4.0))),
    }
  )
  (reward,) = reward_fn([None])
  assert reward.value == 4.0
  assert reward.parts == {"a": 3.0, "b": 4.0, "x": 1.0, "y": 2.0}


def test_one_reward_of_weight_one_is_unchanged():
  values = [0.1 + 0.2, 1 / 3, -1e-17, 1.5]
  rewards = [types.Reward(value) for value in values]
  reward_fn = combine.weighted({"a": (1.0, _fixed(*rewards))})
  combined = [reward.value for reward in reward_fn([None] * 4)]
  assert combined == values


@pytest.mark.parametrize(
  "lost",
  [
    types.Reward(None, "the judge timed out"),
    types.Reward(math.nan),
    types.Reward(math.inf),
  ],
)
def test_a_missing_term_makes_the_sum_missing(lost):
  reward_fn = combine.weighted(
    {
      "a": (1.0, _fixed(types.Reward(1.0), types.Reward(1.0))),
      "b": (1.0, _fixed(lost, types.Reward(2.0))),
    }
  )
  first, second = reward_fn([None, None])
  assert first.value is None
  assert first.missing_reason.startswith("b: ")
  assert second.value == 3.0


def test_a_reward_that_is_constant_over_a_step_is_logged_once(caplog):
  values = iter([[0.0, 0.0], [0.0, 0.0], [0.0, 0.5], [0.5, 0.5], [0.5]])
  reward_fn = combine.weighted(
    {
      "a": (1.0, lambda _: list(map(types.Reward, next(values)))),
      "lost": (
        0.0,
        lambda records: [types.Reward(None, "lost")] * len(records),
      ),
    }
  )
  for size in (2, 2, 2, 2, 1):
    reward_fn([None] * size)
  lines = [r.getMessage() for r in caplog.records if "Reward" in r.getMessage()]
  assert [line.partition(":")[0] for line in lines] == [
    "Reward a is 0 for all 2 completions of a step",
    "Reward a is 0.5 for all 2 completions of a step",
  ]


def test_a_function_must_reward_every_record():
  reward_fn = combine.weighted({"a": (1.0, _fixed(types.Reward(1.0)))})
  with pytest.raises(ValueError, match="argument 2"):
    reward_fn([None, None])


@pytest.mark.parametrize("weights", [{}, {"exact": math.nan}])
def test_weights_must_be_finite_and_not_all_zero(weights):
  with pytest.raises(errors.ConfigError, match="weights"), _open(**weights):
    pass


def test_rlt_requires_a_student():
  with pytest.raises(errors.ConfigError, match="rlt"), _open(rlt=1.0):
    pass


def test_a_reward_with_weight_zero_is_not_built():
  config = teaching.get_config()
  config.overlong.soft_fraction = 10.0
  with combine.open_reward(
    **config, functions=_NONE, student=None, max_tokens=200
  ) as reward_fn:
    assert reward_fn([]) == []


def test_user_functions_are_added():
  functions = custom.parse(
    ["tests.reward_functions:count_words=0.5"], timeout_s=20, memory_gb=0
  )
  record = types.TeachingRecord(
    question=types.Question("q", "1 + 1?", "2"),
    probe="",
    teacher_rollout=types.Rollout(
      types.Prompt("q", "", (1,)),
      types.Completion((1,), (-1.0,), (-1.0,), "stop", 0),
    ),
    teaching="just add",
    num_teaching_tokens=2,
    baseline=(),
    taught=(),
  )
  with _open(functions, well_formed=3.0) as reward_fn:
    (reward,) = reward_fn([record])
  assert reward.value == 3.0 + 0.5 * 2.0
  name = "tests.reward_functions:count_words"
  assert reward.parts == {"well_formed": 1.0, name: 2.0, "words": 2.0}
  description = combine.describe({"well_formed": 3.0, "exact": 0.0}, functions)
  assert description == f"3 well_formed + 0.5 {name}"
