# SPDX-License-Identifier: Apache-2.0
"""Tests on-policy and data completions, and limits on dropped ones."""

import dataclasses

import numpy as np
import pytest

from atlas_jax import errors, types
from atlas_jax.data import loader, pairs
from atlas_jax.train import gkd_batches, trainable
from atlas_jax.train.telemetry import clock as train_clock
from tests import fakes, tiny

_PARAMS = types.SamplingParams(
  group_size=2,
  max_completion_tokens=3,
  temperature=0.9,
  top_p=1.0,
  top_k=0,
  seed=7,
)
_VOCABULARY = 200


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return fakes.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@dataclasses.dataclass
class _Made:
  completions: gkd_batches.CompletionBatches
  sampler: fakes.FakeSampler
  train_set: pairs.PairLoader

  def take(self, step):
    return self.completions.take({}, step, train_clock.Clock())


def _make(tokenizer, *, text="a", **changes):
  found = [(np.arange(3, 9 + i), 2 + i) for i in range(4)]
  train_set = pairs.PairLoader(
    found,
    names=["row"] * 4,
    mix=loader.Mix((4,), (), 0),
    batch_size=2,
    remainder="drop",
  )
  sampler = fakes.FakeSampler(tokenizer, lambda *_: text)
  settings = {
    "params": _PARAMS,
    "vocab_size": _VOCABULARY,
    "chunk_tokens": 8,
    "on_policy_fraction": 1.0,
    "max_dropped_fraction": 0.5,
    "max_prob_error": 1.01,
    "compare_every": 1,
  }
  made = gkd_batches.CompletionBatches(
    trainable.full_policy(tiny.build("qwen2")),
    sampler,
    train_set,
    **{**settings, **changes},
  )
  return _Made(made, sampler, train_set)


def test_the_policy_completes_prompts_with_current_weights(tokenizer):
  made = _make(tokenizer)
  written, metrics = made.take(5)
  ((prompts, params),) = made.sampler.calls
  batch = made.train_set.batch(5)
  assert [p.token_ids for p in prompts] == [tuple(p.prompt) for p in batch]
  assert [p.row_id for p in prompts] == [p.row_id for p in batch]
  assert params == dataclasses.replace(_PARAMS, seed=7 + 5)
  assert made.sampler.version == 5
  expected = (*tokenizer.encode("a"), tokenizer.eos_token_id)
  assert [w.completion for w in written] == [expected] * 4
  assert [w.prompt for w in written[::2]] == [p.token_ids for p in prompts]
  assert metrics["on_policy"] == 1.0
  assert metrics["completion_length"] == 2.0
  assert metrics["dropped_fraction"] == metrics["truncated_fraction"] == 0.0


def test_off_policy_steps_use_completions_of_the_data(tokenizer):
  made = _make(tokenizer, on_policy_fraction=0.0)
  written, metrics = made.take(0)
  assert made.sampler.calls == []
  batch = made.train_set.batch(0)
  for one, pair in zip(written, batch, strict=True):
    np.testing.assert_array_equal(one.prompt, pair.prompt)
    np.testing.assert_array_equal(one.completion, pair.completion)
  assert metrics == {"on_policy": 0.0, "completion_length": 4.0}


def test_on_policy_steps_depend_only_on_seed_and_step(tokenizer):
  def drawn(seed, fraction=0.25):
    params = dataclasses.replace(_PARAMS, seed=seed)
    made = _make(tokenizer, params=params, on_policy_fraction=fraction)
    return [made.completions.is_sampled(step) for step in range(400)]

  assert drawn(7) == drawn(7) != drawn(8)
  assert 70 < sum(drawn(7)) < 130
  # A larger fraction samples a superset of the steps.
  assert all(
    more for less, more in zip(drawn(7), drawn(7, 0.5), strict=True) if less
  )


def test_a_sampler_that_ignores_new_weights_raises(tokenizer):
  made = _make(tokenizer)
  made.sampler.update_weights = lambda *_: None
  with pytest.raises(RuntimeError, match=r"versions \[0\] at step 1"):
    made.take(1)


@pytest.mark.parametrize("reason", ["given up", "unknown tokens"])
def test_dropped_completions_are_counted_and_bounded(tokenizer, reason):
  made = _make(tokenizer)
  first, second = (p.row_id for p in made.train_set.batch(0))
  if reason == "given up":
    made.sampler.given_up = {first}
  else:  # The teacher's vocabulary excludes the tokenizer's merges.
    assert max(tokenizer.encode("question")) >= _VOCABULARY
    made.sampler._write = lambda prompt, *_: (
      "question" if prompt.row_id == first else "a"
    )
  written, metrics = made.take(0)
  assert metrics["dropped_fraction"] == 0.5
  assert len(written) == 2
  assert {tuple(w.prompt) for w in written} == {
    tuple(p.prompt) for p in made.train_set.batch(0) if p.row_id == second
  }
  strict = _make(tokenizer, max_dropped_fraction=0.4)
  strict.sampler.given_up, strict.sampler._write = (
    made.sampler.given_up,
    made.sampler._write,
  )
  with pytest.raises(errors.RolloutError, match="2 of 4 completions") as caught:
    strict.take(0)
  assert caught.value.exit_code == 6
