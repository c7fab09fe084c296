# SPDX-License-Identifier: Apache-2.0
"""Packed rollouts contain every token once, at the recorded place."""

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from atlas_jax import types
from atlas_jax.train import rollout_packing

_LENGTH = 32
_SIZES = st.lists(
  st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=40
)


def _rollouts(sizes):
  """Returns rollouts of (prompt, completion) lengths, of distinct tokens."""
  rng = np.random.default_rng(0)
  rollouts, first = [], 1
  for num_prompt, num_written in sizes:
    middle, last = first + num_prompt, first + num_prompt + num_written
    logprobs = tuple(rng.normal(size=num_written).tolist())
    prompt = types.Prompt("", "", tuple(range(first, middle)))
    written = tuple(range(middle, last))
    completion = types.Completion(written, logprobs, logprobs, "stop", 0)
    rollouts.append(types.Rollout(prompt, completion))
    first = last
  return rollouts


def _lay_out(rollouts, **changes):
  settings = {
    "num_minibatches": 1,
    "num_shards": 1,
    "max_completion_tokens": 12,
    "length": _LENGTH,
    "packed": True,
    "per_device": 0,
  }
  return rollout_packing.lay_out(rollouts, **{**settings, **changes})


@hypothesis.given(
  _SIZES,
  st.integers(1, 3),
  st.sampled_from([1, 2, 4]),
  st.booleans(),
  st.integers(0, 2),
)
@hypothesis.settings(deadline=None, max_examples=50)
def test_every_token_is_packed_once_and_found_by_its_place(
  sizes, num_minibatches, num_shards, packed, per_device
):
  rollouts = _rollouts(sizes)
  parts = _lay_out(
    rollouts,
    num_minibatches=num_minibatches,
    num_shards=num_shards,
    packed=packed,
    per_device=per_device,
  )
  assert len(parts) == min(num_minibatches, len(rollouts))
  assert len({part.batch["token_ids"].shape for part in parts}) == 1
  seen = []
  for number, part in enumerate(parts):
    batch, ids = part.batch, part.batch["token_ids"]
    assert len(ids) % (num_shards * part.num_microbatches) == 0
    assert len(batch["places"]) % (num_shards * part.num_microbatches) == 0
    if per_device:
      assert len(ids) == num_shards * per_device * part.num_microbatches
    seen += ids[ids > 0].tolist()
    np.testing.assert_array_equal(batch["segment_ids"] > 0, ids > 0)
    if not packed:
      assert batch["segment_ids"].max() == 1

    # With token ids as scores, the gathered scores are the completions.
    found = rollout_packing.gather_scores(
      ids[:, 1:], batch["places"], num_microbatches=part.num_microbatches
    )
    for i, b in part.members:
      assert i % num_minibatches == number
      completion = rollouts[i].completion
      mask = batch["loss_mask"][b]
      assert tuple(np.asarray(found)[b][mask]) == completion.token_ids
      np.testing.assert_allclose(
        batch["rollout_logprobs"][b][mask], completion.logprobs, rtol=1e-6
      )
    empty = set(range(len(batch["places"]))) - {b for _, b in part.members}
    assert not batch["loss_mask"][list(empty)].any()
    _check_segments(batch)
  assert sorted(seen) == list(range(1, sum(map(sum, sizes)) + 1))


def _check_segments(batch):
  """Asserts that a segment is one sequence, with positions from 0."""
  for ids, segments, positions in zip(
    batch["token_ids"],
    batch["segment_ids"],
    batch["positions"],
    strict=True,
  ):
    for segment in range(1, segments.max() + 1):
      (where,) = np.nonzero(segments == segment)
      np.testing.assert_array_equal(where, where[0] + np.arange(len(where)))
      np.testing.assert_array_equal(np.diff(ids[where]), 1)
      np.testing.assert_array_equal(positions[where], np.arange(len(where)))


def test_devices_and_microbatches_have_similar_token_counts():
  sizes = np.random.default_rng(1).integers(1, 12, (200, 2)).tolist()
  (part,) = _lay_out(_rollouts(sizes), num_shards=4, per_device=1, length=128)
  num_tokens = (part.batch["segment_ids"] > 0).sum(axis=1)
  assert part.num_microbatches > 2
  assert num_tokens.min() > 0.9 * num_tokens.max()
  # Devices have contiguous rows; row r is in microbatch r % M.
  split = num_tokens.reshape(4, -1, part.num_microbatches)
  assert split.shape[1] == 1


def test_the_number_of_rows_is_within_a_quarter_of_the_minimum():
  sizes = np.random.default_rng(1).integers(1, 12, (200, 2)).tolist()
  packed, apart = (
    _lay_out(_rollouts(sizes), length=length, packed=packed)[0]
    for length, packed in ((128, True), (0, False))
  )
  total = sum(map(sum, sizes))
  assert packed.batch["token_ids"].size < 1.25 * (total + 128)
  assert apart.batch["token_ids"].size > 2.5 * total


def test_a_longer_sequence_extends_the_rows():
  (part,) = _lay_out(_rollouts([(30, 12), (3, 3)]))
  assert part.batch["token_ids"].shape == (1, 64)


def test_without_a_prompt_the_first_token_is_not_scored():
  (part,) = _lay_out(_rollouts([(0, 3), (0, 3)]))
  np.testing.assert_array_equal(
    part.batch["loss_mask"][:, :4], [[False, True, True, False]] * 2
  )


def test_the_number_of_rows_of_a_score_batch_is_rounded_up():
  batch = rollout_packing.make_tokens(
    [((5, 6), (7,)), ((8,), (9,))] * 2, multiple=3
  )
  assert batch["token_ids"].shape == (6, 32)
  assert batch["token_ids"][1].tolist()[:3] == [8, 9, 0]


@pytest.mark.parametrize(("count", "expected"), [(0, 1), (7, 8), (8, 10)])
def test_row_factors_have_three_significant_bits(count, expected):
  assert rollout_packing._next_factor(count) == expected


@hypothesis.given(
  _SIZES, st.sampled_from([1, 2, 4]), st.booleans(), st.integers(0, 2)
)
@hypothesis.settings(deadline=None, max_examples=50)
def test_pack_rows_masks_in_every_completion_once(
  sizes, num_shards, packed, per_device
):
  rollouts = _rollouts(sizes)
  batch, num_microbatches = rollout_packing.pack_rows(
    [
      rollout_packing.Written(
        r.prompt.token_ids, r.completion.token_ids, r.completion.logprobs
      )
      for r in rollouts
    ],
    num_shards=num_shards,
    length=_LENGTH,
    packed=packed,
    per_device=per_device,
  )
  ids, mask = batch["token_ids"], batch["loss_mask"]
  assert len(ids) % (num_shards * num_microbatches) == 0
  if per_device:
    assert len(ids) == num_shards * per_device * num_microbatches
  written = [t for r in rollouts for t in r.completion.token_ids]
  assert sorted(ids[mask].tolist()) == sorted(written)
  prompts = [t for r in rollouts for t in r.prompt.token_ids]
  assert sorted(ids[ids > 0].tolist()) == sorted(prompts + written)
  logprobs = {
    token: logprob
    for r in rollouts
    for token, logprob in zip(
      r.completion.token_ids, r.completion.logprobs, strict=True
    )
  }
  np.testing.assert_allclose(
    batch["rollout_logprobs"][mask], [logprobs[t] for t in ids[mask].tolist()]
  )
  # The rows match those of `lay_out`.
  (part,) = _lay_out(
    rollouts, num_shards=num_shards, packed=packed, per_device=per_device
  )
  for name in ("token_ids", "positions", "segment_ids"):
    np.testing.assert_array_equal(batch[name], part.batch[name])


def test_pack_rows_masks_out_a_first_token_without_a_prompt():
  batch, _ = rollout_packing.pack_rows(
    [rollout_packing.Written((), (5, 6, 7), (0.0, 0.0, 0.0))],
    num_shards=1,
    length=_LENGTH,
    packed=True,
    per_device=0,
  )
  assert batch["loss_mask"][0, :4].tolist() == [False, True, True, False]
