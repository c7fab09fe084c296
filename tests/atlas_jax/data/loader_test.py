# SPDX-License-Identifier: Apache-2.0
"""A batch is a function of its step; an epoch sees each row once."""

import dataclasses

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from atlas_jax import errors, types
from atlas_jax.data import loader


def _arrays(num_rows):
  return {
    "token_ids": np.arange(1, 2 * num_rows + 1, dtype=np.int32).reshape(-1, 2),
    "loss_mask": np.ones((num_rows, 2), np.bool_),
  }


def _loader(num_rows, *, seed=0, **changes):
  settings = {
    "mix": loader.Mix((num_rows,), (), seed),
    "batch_size": 4,
    "remainder": "drop",
    "share": loader.WHOLE,
  }
  names = [f"row {i}" for i in range(num_rows)]
  return loader.Loader(_arrays(num_rows), names=names, **settings | changes)


def _epoch(data, epoch):
  steps = range(
    epoch * data.num_batches_per_epoch, (epoch + 1) * data.num_batches_per_epoch
  )
  return np.concatenate([data.batch(step)["token_ids"][:, 0] for step in steps])


def _questions(count):
  return [types.Question(str(i), f"{i}?", str(i)) for i in range(count)]


def _question_loader(questions, *, seed=0, batch_size=1):
  mix = loader.Mix((len(questions),), (), seed)
  return loader.QuestionLoader(questions, mix=mix, batch_size=batch_size)


@hypothesis.given(
  num_rows=st.integers(8, 40),
  batch_size=st.integers(1, 8),
  epoch=st.integers(0, 3),
)
def test_epoch_sees_each_row_at_most_once(num_rows, batch_size, epoch):
  seen = _epoch(_loader(num_rows, batch_size=batch_size), epoch)
  assert len(set(seen)) == len(seen) == num_rows - num_rows % batch_size


@hypothesis.given(num_rows=st.integers(1, 40), batch_size=st.integers(1, 8))
def test_padded_epoch_sees_each_row_once(num_rows, batch_size):
  data = _loader(num_rows, batch_size=batch_size, remainder="pad")
  seen = _epoch(data, 0)
  assert len(seen) % batch_size == 0
  assert sorted(seen[seen > 0]) == list(range(1, 2 * num_rows, 2))
  last = data.batch(data.num_batches_per_epoch - 1)
  assert not last["loss_mask"][last["token_ids"] == 0].any()


def test_epochs_and_seeds_differ_in_order():
  data = _loader(32)
  assert not np.array_equal(_epoch(data, 0), _epoch(data, 1))
  assert not np.array_equal(_epoch(data, 0), _epoch(_loader(32, seed=1), 0))


def test_batch_depends_only_on_the_step():
  data = _loader(10)
  batches = [data.batch(step) for step in range(7)]
  for step in (6, 0, 3):
    again = _loader(10).batch(step)
    for name, array in batches[step].items():
      np.testing.assert_array_equal(again[name], array)
      assert again[name].dtype == array.dtype


@pytest.mark.parametrize("remainder", ["drop", "pad"])
def test_processes_share_the_global_batch(remainder):
  whole = _loader(11, remainder=remainder)
  processes = [
    _loader(11, remainder=remainder, share=loader.Share(i, 2)) for i in range(2)
  ]
  for step in range(5):
    np.testing.assert_array_equal(
      np.concatenate([each.batch(step)["token_ids"] for each in processes]),
      whole.batch(step)["token_ids"],
    )


def test_batches_share_no_memory():
  data = _loader(8)
  batch = data.batch(0)
  expected = batch["token_ids"].copy()
  batch["token_ids"][:] = -1
  np.testing.assert_array_equal(data.batch(0)["token_ids"], expected)


@pytest.mark.parametrize("remainder", ["drop", "pad"])
def test_row_names_cover_all_processes(remainder):
  processes = [
    _loader(10, remainder=remainder, share=loader.Share(i, 2)) for i in range(2)
  ]
  for step in range(2 * processes[0].num_batches_per_epoch):
    firsts = np.concatenate(
      [h.batch(step)["token_ids"][:, 0] for h in processes]
    )
    names = [f"row {(first - 1) // 2}" for first in firsts if first]
    assert sorted(names) == sorted(processes[0].row_names(step))


def test_fingerprint_depends_on_contents_not_order_of_names():
  arrays = _arrays(8)
  settings = {
    "batch_size": 4,
    "remainder": "drop",
    "share": loader.WHOLE,
  }

  def digest(changed):
    names = [""] * len(changed["token_ids"])
    mix = loader.Mix((len(names),), (), 0)
    made = loader.Loader(changed, names=names, mix=mix, **settings)
    return made.fingerprint()

  assert digest(dict(reversed(arrays.items()))) == digest(arrays)
  for name in arrays:
    changed = {key: array.copy() for key, array in arrays.items()}
    changed[name][3, 1] ^= 1
    assert digest(changed) != digest(arrays)
  mirrored = {**arrays, "token_ids": arrays["token_ids"][:, ::-1]}
  assert digest(mirrored) != digest(arrays)
  reshaped = {name: array.reshape(4, 4) for name, array in arrays.items()}
  assert digest(reshaped) != digest(arrays)


@pytest.mark.parametrize("remainder", ["drop", "pad"])
def test_an_epoch_with_fewer_rows_than_a_batch_is_padded(remainder):
  data = _loader(3, remainder=remainder)
  assert data.num_batches_per_epoch == 1
  for step in range(3):
    assert sorted(data.row_names(step)) == ["row 0", "row 1", "row 2"]
    assert not data.batch(step)["token_ids"][3].any()
  with pytest.raises(ValueError, match="at least one row"):
    _loader(0, remainder=remainder)


@pytest.mark.parametrize("batch_size", [0, 3])
def test_batch_size_must_divide_by_processes(batch_size):
  with pytest.raises(errors.ConfigError, match="multiple"):
    _loader(8, batch_size=batch_size, share=loader.Share(0, 2))


def test_unequal_arrays_and_unknown_remainder_are_rejected():
  with pytest.raises(ValueError, match="remainder"):
    _loader(8, remainder="keep")
  uneven = {**_arrays(8), "positions": np.zeros((7, 2))}
  with pytest.raises(ValueError, match="rows, got"):
    loader.Loader(
      uneven,
      names=[""] * 8,
      mix=loader.Mix((8,), (), 0),
      batch_size=1,
      remainder="drop",
      share=loader.WHOLE,
    )


@hypothesis.given(
  count=st.integers(4, 30), batch_size=st.integers(1, 4), seed=st.integers(0, 5)
)
def test_each_question_appears_once_per_epoch(count, batch_size, seed):
  data = _question_loader(_questions(count), seed=seed, batch_size=batch_size)
  num_batches = count // batch_size
  epochs = [
    [
      question
      for number in range(num_batches)
      for question in data.batch(epoch * num_batches + number)
    ]
    for epoch in range(2)
  ]
  for seen in epochs:
    assert len({question.row_id for question in seen}) == len(seen)
    assert len(seen) == num_batches * batch_size


def test_questions_are_reshuffled_reproducibly():
  questions = _questions(16)
  data = _question_loader(questions, batch_size=16)
  first, second = data.batch(0), data.batch(1)
  assert first != second != questions
  assert first == _question_loader(questions, batch_size=16).batch(0)


def test_too_few_questions_are_rejected():
  with pytest.raises(errors.DataError, match="must be at most 3") as info:
    _question_loader(_questions(3), batch_size=4)
  assert info.value.where == "--config.batch.num_questions=4"


def test_fingerprint_of_questions_depends_on_contents_and_order():
  questions = _questions(3)
  other = types.Question("2", "2?", "3")
  rephrased = dataclasses.replace(questions[0], paraphrase="Zero?")
  changed = [rephrased, *questions[1:]]  # Read by evaluation only.
  assert (
    _question_loader(changed).fingerprint()
    == _question_loader(questions).fingerprint()
  )
  digests = [
    _question_loader(changed, **settings).fingerprint()
    for changed, settings in (
      (questions, {}),
      (questions[::-1], {}),
      (questions[:2], {}),
      ([*questions[:2], other], {}),
      (questions, {"seed": 1}),
      (questions, {"batch_size": 2}),
    )
  ]
  assert len(set(digests)) == len(digests)
  assert digests[0] == _question_loader(_questions(3)).fingerprint()


@pytest.mark.parametrize(
  "changes", [{"seed": 1}, {"batch_size": 2}, {"remainder": "pad"}]
)
def test_fingerprint_covers_all_that_changes_batches(changes):
  assert _loader(8, **changes).fingerprint() != _loader(8).fingerprint()


def test_fingerprint_is_the_same_on_every_host():
  other = _loader(8, share=loader.Share(1, 2))
  assert other.fingerprint() == _loader(8).fingerprint()


@hypothesis.given(
  sizes=st.lists(st.integers(1, 30), min_size=1, max_size=3),
  weights=st.lists(st.floats(0.1, 9.0), min_size=3, max_size=3),
  seed=st.integers(0, 3),
)
def test_mix_has_its_shares_and_loses_no_row(sizes, weights, seed):
  mix = loader.Mix(tuple(sizes), tuple(weights[: len(sizes)]), seed)
  counts = mix._counts()
  bounds = np.cumsum([0, *sizes])
  seen = np.zeros(sum(sizes), int)
  for epoch in range(40):
    order = mix.order(epoch)
    assert len(order) == mix.num_rows
    assert list(np.histogram(order, bounds)[0]) == counts
    seen += np.bincount(order, minlength=sum(sizes))
  for first, last, count in zip(bounds[:-1], bounds[1:], counts, strict=True):
    # Counts differ by at most 1: a row repeats only after all others.
    assert seen[first:last].sum() == 40 * count
    assert np.ptp(seen[first:last]) <= 1
  share = np.array(weights[: len(sizes)]) / sum(weights[: len(sizes)])
  np.testing.assert_allclose(counts, share * sum(sizes), atol=1.0)


def test_without_weights_each_epoch_has_all_rows():
  mix = loader.Mix((3, 5), (), 0)
  for epoch in range(3):
    assert sorted(mix.order(epoch)) == list(range(8))
  assert not np.array_equal(mix.order(0), mix.order(1))


def test_mix_depends_only_on_the_step():
  def made():
    mix = loader.Mix((6, 2), (1.0, 3.0), 0)
    return _loader(8, mix=mix, batch_size=3)

  late = made().batch(7)["token_ids"]
  data = made()
  for step in range(7):
    data.batch(step)
  np.testing.assert_array_equal(data.batch(7)["token_ids"], late)


@pytest.mark.parametrize(
  "weights", [(1.0,), (1.0, 0.0), (1.0, -1.0), (1.0, float("nan"))]
)
def test_invalid_weights_are_rejected(weights):
  with pytest.raises(errors.ConfigError, match="weight"):
    loader.Mix((4, 4), weights, 0)
