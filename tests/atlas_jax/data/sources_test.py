# SPDX-License-Identifier: Apache-2.0
"""Files, directories and their parts are found, or rejected."""

import csv
import gzip
import json

import pyarrow
from pyarrow import parquet
import pytest

from atlas_jax import errors
from atlas_jax.data import quarantine, sources

_TABLE = [
  {"question": "1 + 1?", "answer": "2"},
  {"question": "A\u2028line \u00e9?", "answer": "3"},
]


def _write_jsonl(path, table=_TABLE):
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in table]
  path.write_bytes("".join(lines).encode())
  return str(path)


def _write_parquet(path, table=_TABLE):
  path.parent.mkdir(parents=True, exist_ok=True)
  parquet.write_table(pyarrow.Table.from_pylist(table), path)


def _read(source, default_part=""):
  kept_apart = quarantine.Quarantine(None, max_bad_rows=0)
  return list(sources.read(sources.parse(source), default_part, kept_apart))


def _ids(source, default_part=""):
  return [row.row_id for row in _read(source, default_part)]


def _write_all(tmp_path):
  """Writes the table as a file of each type; returns their names."""
  _write_jsonl(tmp_path / "a.jsonl")
  _write_parquet(tmp_path / "a.parquet")
  (tmp_path / "a.json").write_text(json.dumps(_TABLE, indent=2))
  for ending, separator in (("csv", ","), ("tsv", "\t")):
    with (tmp_path / f"a.{ending}").open("w", newline="") as out:
      writer = csv.DictWriter(out, list(_TABLE[0]), delimiter=separator)
      writer.writeheader()
      writer.writerows(_TABLE)
  for ending in ("jsonl", "json", "csv", "tsv"):
    raw = (tmp_path / f"a.{ending}").read_bytes()
    (tmp_path / f"a.{ending}.gz").write_bytes(gzip.compress(raw))
    with pyarrow.CompressedOutputStream(
      str(tmp_path / f"a.{ending}.zst"), "zstd"
    ) as out:
      out.write(raw)
  return sorted(path.name for path in tmp_path.iterdir())


def test_all_file_types_yield_the_same_rows(tmp_path):
  names = _write_all(tmp_path)
  assert len(names) == 13
  for name in names:
    found = _read(str(tmp_path / name))
    assert [row.values for row in found] == _TABLE
    # A row of a table is located by its line, below the columns' names.
    first = 2 if name.startswith(("a.csv", "a.tsv")) else 1
    assert [row.row_id for row in found] == [f"a:{first}", f"a:{first + 1}"]
    assert found[1].where == f"{tmp_path / name}:{first + 1}"


def test_endings_are_recognized_in_any_case(tmp_path):
  (tmp_path / "DATA.CSV").write_text("x\n1\n")
  (row,) = _read(str(tmp_path / "DATA.CSV"))
  assert (row.row_id, row.values) == ("DATA:2", {"x": "1"})


@pytest.mark.parametrize("ending", ["csv.gz", "csv.zst", "json.zst"])
def test_truncated_and_invalid_compressed_files_are_rejected(tmp_path, ending):
  _write_all(tmp_path)
  path = tmp_path / f"a.{ending}"
  for content in (path.read_bytes()[:-9], b"not compressed"):
    path.write_bytes(content)
    with pytest.raises(errors.DataError, match="Cannot read data file"):
      _read(str(path))


def test_directory_is_read_in_order_of_names(tmp_path):
  _write_jsonl(tmp_path / "b.jsonl")
  _write_jsonl(tmp_path / "a.json", _TABLE[:1])
  (tmp_path / "README.md").write_text("about")
  assert _ids(str(tmp_path)) == ["a:1", "b:1", "b:2"]


@pytest.fixture
def snapshot(tmp_path):
  """A downloaded Hub dataset repository, with two subsets."""
  for subset in ("main", "socratic"):
    for split in ("train", "test"):
      name = f"{split}-00000-of-00001.parquet"
      _write_parquet(tmp_path / subset / name, [{"x": f"{subset} {split}"}])
  _write_jsonl(tmp_path / "dataset_infos.json", [{"about": "it"}])
  return tmp_path


@pytest.mark.parametrize(
  ("part", "expected"),
  [
    ("main/train", ["main train"]),
    ("socratic/test", ["socratic test"]),
    ("train", ["main train", "socratic train"]),
    ("main/test-00000-of-00001.parquet", ["main test"]),
  ],
)
def test_part_of_a_directory_is_read(snapshot, part, expected):
  for found in (_read(f"{snapshot}:{part}"), _read(str(snapshot), part)):
    assert [row.values["x"] for row in found] == expected
  assert _ids(f"{snapshot}:main/train") == ["main/train-00000-of-00001:1"]


def test_splits_are_not_merged(snapshot):
  with pytest.raises(errors.DataError, match="more than one split") as info:
    _read(str(snapshot))
  assert "socratic/test-00000-of-00001.parquet" in info.value.why
  for part in ("validation", "other/train", "main/none.jsonl"):
    with pytest.raises(errors.DataError, match="No data files"):
      _read(f"{snapshot}:{part}")


def test_part_matches_whole_words_of_a_name(tmp_path):
  _write_jsonl(tmp_path / "curriculum/arc_atlas_teach_rl.jsonl", [{"x": "rl"}])
  _write_jsonl(tmp_path / "curriculum/world.jsonl", [{"x": "world"}])
  (row,) = _read(f"{tmp_path}:rl")
  assert row.values == {"x": "rl"}


def test_directory_without_the_default_part_is_read_completely(tmp_path):
  _write_jsonl(tmp_path / "mine.jsonl")
  assert _ids(str(tmp_path), "main/train") == ["mine:1", "mine:2"]


def test_links_into_a_cache_are_followed(tmp_path):
  _write_jsonl(tmp_path / "blobs/0a1b")
  (tmp_path / "snapshot").mkdir()
  (tmp_path / "snapshot/train.jsonl").symlink_to(tmp_path / "blobs/0a1b")
  assert _ids(str(tmp_path / "snapshot")) == ["train:1", "train:2"]


def test_saved_datasets_are_read_without_the_package(tmp_path):
  datasets = pytest.importorskip("datasets")
  whole = datasets.DatasetDict(
    train=datasets.Dataset.from_list(_TABLE),
    test=datasets.Dataset.from_list(_TABLE[:1]),
  )
  whole.save_to_disk(tmp_path / "both")
  whole["train"].save_to_disk(tmp_path / "one")
  (tmp_path / "one/cache-0.arrow").write_bytes(b"")
  for source in (f"{tmp_path}/both:train", f"{tmp_path}/one"):
    assert [row.values for row in _read(source)] == _TABLE
  with pytest.raises(errors.DataError, match="more than one split"):
    _read(f"{tmp_path}/both")


@pytest.mark.parametrize(
  "name", ["a.jsonl", "a.parquet", "no such/kind.csv", "a.jsonl:train"]
)
def test_missing_or_unknown_file_is_rejected(tmp_path, name):
  with pytest.raises(errors.DataError) as info:
    _read(str(tmp_path / name))
  assert info.value.where == str(tmp_path / name)


def test_missing_file_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(errors.DataError, match="not a file"):
    _read("data/train.jsonl")


def test_file_with_a_part_or_unknown_ending_is_rejected(tmp_path):
  path = _write_jsonl(tmp_path / "a.jsonl")
  with pytest.raises(errors.DataError, match="no parts"):
    _read(f"{path}:train")
  (tmp_path / "a.xlsx").write_text("x\n1\n")
  with pytest.raises(errors.DataError, match=r"\.jsonl, \.json, \.csv"):
    _read(str(tmp_path / "a.xlsx"))


def test_hub_id_is_parsed():
  found = sources.parse("owner/name@refs/pr/3:main/train")
  assert found == sources.Source(
    "owner/name", is_local=False, revision="refs/pr/3", part="main/train"
  )
  assert sources.parse("owner/name").part == ""


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_corrupt_tables_are_rejected(tmp_path, ending):
  path = tmp_path / f"a.{ending}"
  for content in (b"", b"PAR1 no more"):
    path.write_bytes(content)
    with pytest.raises(errors.DataError, match=rf"a\.{ending}"):
      _read(str(path))
