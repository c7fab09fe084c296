# SPDX-License-Identifier: Apache-2.0
"""Rows of Hub datasets, and errors without the Hub."""

import sys

import pytest

from atlas_jax import errors
from atlas_jax.data import quarantine, sources

datasets = pytest.importorskip("datasets")


def _part(*answers):
  return datasets.Dataset.from_list([{"answer": answer} for answer in answers])


def _serve(monkeypatch, **parts):
  """Fakes the Hub; returns the arguments of the requests."""
  whole = datasets.DatasetDict(parts)
  asked = []

  def load_dataset(name, subset, *, split, data_files, revision):
    asked.append((name, subset, split, data_files, revision))
    return whole[split] if split else whole

  monkeypatch.setattr(datasets, "load_dataset", load_dataset)
  return asked


def _read(source, default_part=""):
  kept_apart = quarantine.Quarantine(None, max_bad_rows=0)
  return list(sources.read(sources.parse(source), default_part, kept_apart))


def test_named_split_and_only_split_are_read(monkeypatch):
  _serve(monkeypatch, train=_part("1", "2"), test=_part("3"))
  found = _read("owner/name:train")
  assert [row.values for row in found] == [{"answer": "1"}, {"answer": "2"}]
  assert found[1].where == "owner/name:2"
  _serve(monkeypatch, train=_part("1"))
  assert [row.row_id for row in _read("owner/name")] == ["name:1"]


@pytest.mark.parametrize(
  ("source", "asked"),
  [
    ("o/n:main/train", ("o/n", "main", "train", None, None)),
    ("o/n@v1:train", ("o/n", None, "train", None, "v1")),
    ("o/n", ("o/n", "usual", "train", None, None)),
    ("o/n:a/b.jsonl", ("o/n", None, "train", "a/b.jsonl", None)),
  ],
)
def test_revision_subset_split_and_file_are_passed_on(
  monkeypatch, source, asked
):
  seen = _serve(monkeypatch, train=_part("1"))
  _read(source, "usual/train")
  assert seen == [asked]


def test_split_must_be_named_where_there_are_two(monkeypatch):
  _serve(monkeypatch, train=_part("1"), test=_part("3"))
  with pytest.raises(errors.DataError, match="train, test"):
    _read("owner/name")


def test_unreachable_dataset_is_rejected():
  with pytest.raises(errors.DataError, match="owner/nothing-of-this-name"):
    _read("owner/nothing-of-this-name")


def test_missing_package_is_reported_with_the_command(monkeypatch):
  monkeypatch.setitem(sys.modules, "datasets", None)
  monkeypatch.delitem(sys.modules, "atlas_jax.data.hub", raising=False)
  monkeypatch.delattr("atlas_jax.data.hub", raising=False)
  with pytest.raises(errors.ConfigError, match=r"atlas_jax\[hub\]"):
    _read("owner/name")
