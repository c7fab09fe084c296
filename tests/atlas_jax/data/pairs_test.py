# SPDX-License-Identifier: Apache-2.0
"""Prompts end where the last completion begins; batches depend on the step."""

import numpy as np
import pytest

from atlas_jax import errors
from atlas_jax.data import loader, pairs


def _example(*runs):
  """Converts (tokens, is target) spans to ids 1, 2, ... and a loss mask."""
  mask = np.concatenate([np.full(size, marked) for size, marked in runs])
  return np.arange(1, len(mask) + 1), mask


def _split(example, length=100, max_new_tokens=0, too_long="drop"):
  return pairs.split(
    example, length=length, max_new_tokens=max_new_tokens, too_long=too_long
  )


def test_last_turn_is_the_completion_and_the_rest_is_dropped():
  example = _example((3, False), (2, True), (4, False), (2, True), (1, False))
  token_ids, num_prompt = _split(example)
  assert token_ids.tolist() == list(range(1, 12))
  assert num_prompt == 9


def test_empty_loss_mask_is_rejected():
  with pytest.raises(ValueError, match="must mark at least one token"):
    _split(_example((3, False)))


@pytest.mark.parametrize(
  ("length", "max_new_tokens", "fits"),
  [(10, 0, True), (9, 0, False), (10, 4, True), (10, 5, False), (11, 5, True)],
)
def test_prompt_with_given_and_sampled_completion_must_fit(
  length, max_new_tokens, fits
):
  found = _split(_example((6, False), (4, True)), length, max_new_tokens)
  assert (found is not None) == fits


def test_completions_are_truncated_on_request_and_prompts_never():
  example = _example((6, False), (4, True))
  token_ids, num_prompt = _split(example, 8, too_long="truncate")
  assert (len(token_ids), num_prompt) == (8, 6)
  assert _split(example, 6, too_long="truncate") is None
  assert _split(example, 8, max_new_tokens=3, too_long="truncate") is None
  with pytest.raises(errors.DataError, match="longer than a row") as caught:
    _split(example, 8, too_long="error")
  assert caught.value.exit_code == 3


def _loader(batch_size=2, remainder="drop", seed=0, first=1):
  made = [(np.arange(first, first + 2 + i), 1 + i) for i in range(5)]
  return pairs.PairLoader(
    made,
    names=[f"row {i}" for i in range(5)],
    mix=loader.Mix((5,), (), seed),
    batch_size=batch_size,
    remainder=remainder,
  )


def test_batch_has_the_pairs_of_its_rows():
  found = _loader()
  for step in range(6):
    for pair, name in zip(
      found.batch(step), found.row_names(step), strict=True
    ):
      number = int(pair.row_id)
      assert name == f"row {number}"
      tokens = [*pair.prompt, *pair.completion]
      assert tokens == list(range(1, 3 + number))
      assert len(pair.prompt) == 1 + number
  assert found.num_prompt_tokens.tolist() == [1, 2, 3, 4, 5]
  assert found.num_completion_tokens.tolist() == [1] * 5


def test_padded_batch_has_fewer_pairs_and_an_epoch_has_all():
  found = _loader(remainder="pad")
  batches = [found.batch(i) for i in range(found.num_batches_per_epoch)]
  assert sorted(len(batch) for batch in batches) == [1, 2, 2]
  assert {p.row_id for batch in batches for p in batch} == set("01234")


def test_fingerprint_depends_on_tokens_order_and_size():
  same = _loader().fingerprint()
  assert _loader().fingerprint() == same
  others = (_loader(seed=1), _loader(batch_size=3), _loader(first=2))
  assert len({same, *(other.fingerprint() for other in others)}) == 4
