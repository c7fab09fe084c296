# SPDX-License-Identifier: Apache-2.0
"""A Hub dataset becomes rows; without the Hub, a message."""

import pytest

from atlas_jax import errors
from atlas_jax.data import sources

datasets = pytest.importorskip("datasets")


def _part(*answers):
  return datasets.Dataset.from_list([{"answer": answer} for answer in answers])


def _serve(monkeypatch, **parts):
  whole = datasets.DatasetDict(parts)

  def load_dataset(name, split):
    assert name == "owner/name"
    return whole[split] if split else whole

  monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_named_split_and_only_split_are_read(monkeypatch):
  _serve(monkeypatch, train=_part("1", "2"), test=_part("3"))
  rows = sources.read("owner/name:train")
  assert [row.values for row in rows] == [{"answer": "1"}, {"answer": "2"}]
  assert rows[1].where == "owner/name:train, row 2"
  _serve(monkeypatch, train=_part("1"))
  assert [row.row_id for row in sources.read("owner/name")] == ["name:1"]


def test_split_must_be_named_where_there_are_two(monkeypatch):
  _serve(monkeypatch, train=_part("1"), test=_part("3"))
  with pytest.raises(errors.DataError, match="train, test"):
    sources.read("owner/name")


def test_unreachable_dataset_is_told():
  with pytest.raises(errors.DataError, match="owner/nothing-of-this-name"):
    sources.read("owner/nothing-of-this-name")
