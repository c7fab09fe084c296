# SPDX-License-Identifier: Apache-2.0
"""Packed rollouts contain every token once, at the recorded place."""

import hypothesis
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from atlas_jax import types
from atlas_jax.train import batch_shapes, rollout_packing

_LENGTH = 32
# One program per shape, not one per operation and shape.
_gather_scores = jax.jit(rollout_packing.gather_scores)
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


def _layout(**changes):
  settings = {
    "length": _LENGTH,
    "packed": True,
    "per_device": 0,
    "num_minibatches": 1,
    "num_shards": 1,
    "max_sequences": 40,
    "max_length": 3 * _LENGTH,
  }
  return batch_shapes.Layout(**{**settings, **changes})


def _lay_out(rollouts, **changes):
  return rollout_packing.lay_out(
    rollouts, _layout(**changes), max_completion_tokens=12
  )


def _written(rollouts):
  return [
    rollout_packing.Written(
      r.prompt.token_ids, r.completion.token_ids, r.completion.logprobs
    )
    for r in rollouts
  ]


def _gathered(part):
  """Gathers token ids as if they were scores; 0 without a score."""
  places_BC, shape = part.batch["completions"]["places"], part.num_microbatches
  rows = part.batch["token_ids"]
  rows = rows.reshape(-1, shape, rows.shape[1])
  found_BC = np.zeros_like(places_BC)
  for microbatch in range(part.num_microbatches):
    scores, is_here = jax.device_get(
      _gather_scores(rows[:, microbatch, 1:], places_BC, microbatch)
    )
    assert not found_BC[is_here].any()  # In one microbatch only.
    assert not scores[~is_here].any()
    found_BC += scores
  return found_BC


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
  seen = []
  for number, part in enumerate(parts):
    ids, places_BC = (
      part.batch["token_ids"],
      part.batch["completions"]["places"],
    )
    assert len(ids) % (num_shards * part.num_microbatches) == 0
    assert len(places_BC) % num_shards == 0
    seen += ids[ids > 0].tolist()
    np.testing.assert_array_equal(part.batch["segment_ids"] > 0, ids > 0)
    if not packed:
      assert part.batch["segment_ids"].max() == 1
    unused = ids.reshape(-1, part.num_microbatches, ids.shape[1])
    assert not unused[:, part.num_used :].any()

    found_BC = _gathered(part)
    assert part.indices == range(number, len(rollouts), len(parts))
    for b, i in enumerate(part.indices):
      completion, mask = rollouts[i].completion, places_BC[b] >= 0
      assert tuple(found_BC[b][mask]) == completion.token_ids
      np.testing.assert_allclose(
        part.batch["completions"]["rollout_logprobs"][b][mask],
        completion.logprobs,
        rtol=1e-6,
      )
    assert (places_BC[len(part.indices) :] == -1).all()
    _check_segments(part.batch)
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


_MANY = np.random.default_rng(1).integers(1, 12, (200, 2)).tolist()


def test_devices_and_used_microbatches_have_similar_token_counts():
  (part,) = _lay_out(
    _rollouts(_MANY), num_shards=4, per_device=1, length=128, max_sequences=200
  )
  num_tokens = (part.batch["segment_ids"] > 0).sum(axis=1)
  # Devices have contiguous rows; row r is in microbatch r % M.
  num_tokens = num_tokens.reshape(4, part.num_microbatches)[:, : part.num_used]
  assert part.num_used > 2
  assert num_tokens.min() > 0.9 * num_tokens.max()


def test_few_microbatches_are_used():
  packed, apart = (
    _lay_out(
      _rollouts(_MANY),
      length=length,
      packed=packed,
      per_device=4,
      max_sequences=200,
    )[0]
    for length, packed in ((128, True), (0, False))
  )
  total = sum(map(sum, _MANY))
  assert packed.num_computed < 1.25 * (total + 4 * 128)
  assert apart.num_computed == 200 * 32


def test_the_layout_at_the_top_of_the_file():
  # With rows of 32 tokens, instead of 6.
  sizes = [(20, 12), (12, 8), (14, 6), (1, 11), (2, 10)]
  (part,) = _lay_out(_rollouts(sizes), per_device=2, max_sequences=6)
  assert (part.num_microbatches, part.num_used) == (3, 2)
  num_tokens = (part.batch["segment_ids"] > 0).sum(axis=1)
  assert num_tokens.tolist() == [32, 20, 0, 20, 24, 0]


def test_the_number_of_rows_of_a_score_batch_is_rounded_up():
  batch = rollout_packing.make_tokens(
    [((5, 6), (7,)), ((8,), (9,))] * 2, multiple=3
  )
  assert batch["token_ids"].shape == (6, 32)
  assert batch["token_ids"][1].tolist()[:3] == [8, 9, 0]


def test_sequences_beyond_the_menu_raise():
  with pytest.raises(ValueError, match="1 sequences of up to 97 tokens exceed"):
    _lay_out(_rollouts([(90, 7)]))
  with pytest.raises(ValueError, match="3 sequences of up to 3 tokens exceed"):
    _lay_out(_rollouts([(2, 1)] * 3), max_sequences=2)


@hypothesis.given(
  _SIZES, st.sampled_from([1, 2, 4]), st.booleans(), st.integers(0, 2)
)
@hypothesis.settings(deadline=None, max_examples=50)
def test_pack_rows_masks_in_every_completion_once(
  sizes, num_shards, packed, per_device
):
  rollouts = _rollouts(sizes)
  layout = {
    "num_shards": num_shards,
    "packed": packed,
    "per_device": per_device,
  }
  part = rollout_packing.pack_rows(_written(rollouts), _layout(**layout))
  batch = part.batch
  ids, mask = batch["token_ids"], batch["loss_mask"]
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
  (same,) = _lay_out(rollouts, **layout)
  for name in ("token_ids", "positions", "segment_ids"):
    np.testing.assert_array_equal(batch[name], same.batch[name])
  assert part[1:] == same[1:]


def test_without_a_prompt_the_first_token_is_not_scored():
  rollouts = _rollouts([(0, 3), (0, 3)])
  (part,) = _lay_out(rollouts, per_device=1, max_sequences=2)
  np.testing.assert_array_equal(
    part.batch["completions"]["places"][:, :4], [[-1, 0, 1, -1], [-1, 3, 4, -1]]
  )
  layout = _layout(per_device=1, max_sequences=2)
  batch = rollout_packing.pack_rows(_written(rollouts), layout).batch
  np.testing.assert_array_equal(
    batch["loss_mask"][0, :7], [False, True, True, False, True, True, False]
  )
