# SPDX-License-Identifier: Apache-2.0
"""Reads rows from files, directories and Hugging Face Hub datasets."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import pathlib
import re

import pyarrow
from pyarrow import ipc, parquet

from atlas_jax import errors
from atlas_jax.data import delimited, files, jsonl, rows
from atlas_jax.data import quarantine as data_quarantine

_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^:]+))?")
# Metadata and caches that tools store next to the data.
_NO_DATA = re.compile(
  r"(state|config|dataset_(info|infos|dict))\.json|cache-.*\.arrow"
)
_SPLITS = ("train", "validation", "valid", "val", "dev", "eval", "test")

_Reader = Callable[
  [pathlib.Path, str, data_quarantine.Quarantine], Iterator[rows.Row]
]


@dataclasses.dataclass(frozen=True)
class Source:
  """Location of a dataset.

  `place` is a path or the id of a Hub dataset. `part` selects what to read of a
  directory or Hub dataset: "split", "subset/split", or the name of a file.
  """

  place: str
  is_local: bool
  revision: str
  part: str


def parse(source: str) -> Source:
  """Parses the name of a dataset.

  Args:
    source: a file, a directory, or a Hub dataset as `owner/name`, optionally
      followed by `@revision`; the latter two optionally followed by `:part`, as
      in `Source`.

  Raises:
    errors.DataError: if it is neither.
  """
  place, _, part = source.partition(":")
  for known, rest in ((source, ""), (place, part)):
    if pathlib.Path(known).exists():
      return Source(known, is_local=True, revision="", part=rest)
  hub_id = _HUB_ID.fullmatch(place)
  if not hub_id or _ending(place):
    raise errors.DataError(
      f"Dataset not found: {source}.",
      where=source,
      why="It is not a file, a directory or the id of a Hub dataset.",
      fix=f"Set a file ending with {_ENDINGS}, a directory of such "
      'files, or a Hub dataset as "owner/name@revision:split".',
    )
  return Source(
    hub_id["id"], is_local=False, revision=hub_id["revision"] or "", part=part
  )


def read(
  source: Source, default_part: str, quarantine: data_quarantine.Quarantine
) -> Iterator[rows.Row]:
  """Yields the rows of a dataset, with few in memory at a time.

  Args:
    source: from `parse`.
    default_part: read if the source names no part; ignored for a directory
      without it.
    quarantine: records malformed rows.

  Raises:
    errors.DataError: if there is nothing to read, or a file is unreadable.
  """
  if not source.is_local:
    # Imported lazily: `datasets` is an optional extra, and slow to import.
    from atlas_jax.data import hub

    part = source.part or default_part
    subset, _, split = part.rpartition("/")
    values = (
      hub.read(source.place, revision=source.revision, file=part)
      if _ending(part)
      else hub.read(
        source.place, revision=source.revision, subset=subset, split=split
      )
    )
    name = source.place.rpartition("/")[2]
    yield from _number(values, file=source.place, name=name)
    return
  path = pathlib.Path(source.place)
  for file in _files(path, source.part, default_part):
    name = file.relative_to(path) if file != path else pathlib.Path(file.name)
    ending = _ending(file.name)
    stem = name.as_posix()[: -len(ending)]
    yield from _READERS[ending](file, stem, quarantine)


def _files(
  path: pathlib.Path, part: str, default_part: str
) -> Sequence[pathlib.Path]:
  """Returns the files of a source, sorted by name."""
  if path.is_file():
    if part or not _ending(path.name):
      raise errors.DataError(
        "A file has no parts." if part else "Unknown file type.",
        where=f"{path}:{part}" if part else str(path),
        why="Only directories and Hub datasets have parts."
        if part
        else "The type is derived from the file name's ending.",
        fix=f"Set a file that ends with {_ENDINGS}.",
      )
    return [path]
  files = [
    file
    for file in sorted(path.rglob("*"))
    if _ending(file.name) and not _NO_DATA.fullmatch(file.name)
  ]
  found = _select(path, files, part or default_part)
  if not part and not found:
    found = files
  # Merging the training and the test split would leak the latter.
  kinds = {_split(file.relative_to(path)) for file in found}
  if not found or len(kinds) > 1:
    raise errors.DataError(
      "A directory has more than one split."
      if found
      else "No data files found.",
      where=f"{path}:{part}" if part else str(path),
      why=f"It holds {_listed(file.relative_to(path) for file in files)}.",
      fix=f'Name one of its splits, e.g. "{path}:train", or a file.',
    )
  return found


def _select(
  folder: pathlib.Path, files: Sequence[pathlib.Path], part: str
) -> list[pathlib.Path]:
  """Returns the files of a directory that belong to a part; "" is all."""
  if not part:
    return list(files)
  if _ending(part):
    return [file for file in files if file == folder / part]
  subset, _, split = part.rpartition("/")
  word = re.compile(rf"(^|[^a-z0-9]){re.escape(split.lower())}([^a-z0-9]|$)")
  return [
    file
    for file in files
    if (not subset or subset in file.relative_to(folder).parts)
    and word.search(file.relative_to(folder).as_posix().lower())
  ]


def _split(file: pathlib.PurePath) -> str:
  """Returns the split named in a path, or an empty text."""
  words = re.split(r"[^a-z]+", file.as_posix().lower())
  return next((split for split in _SPLITS if split in words), "")


def _listed(files: Iterable[pathlib.PurePath]) -> str:
  names = [file.as_posix() for file in files]
  more = [f"and {len(names) - 8} more"] if len(names) > 8 else []
  return ", ".join(names[:8] + more) or "no data"


def _ending(name: str) -> str:
  """Returns the file type's ending; empty if it is unknown."""
  return next((end for end in _READERS if name.lower().endswith(end)), "")


def _read_parquet(
  path: pathlib.Path, name: str, quarantine: data_quarantine.Quarantine
) -> Iterator[rows.Row]:
  del quarantine  # A table is readable as a whole, or not.
  return _number(_parquet_values(path), file=str(path), name=name)


def _parquet_values(path: pathlib.Path) -> Iterator[dict[str, object]]:
  try:
    with parquet.ParquetFile(path) as file:
      for batch in file.iter_batches(batch_size=256):
        yield from batch.to_pylist()
  except (OSError, pyarrow.ArrowException) as error:
    raise _unreadable(path, error) from error


def _read_arrow(
  path: pathlib.Path, name: str, quarantine: data_quarantine.Quarantine
) -> Iterator[rows.Row]:
  del quarantine
  return _number(_arrow_values(path), file=str(path), name=name)


def _arrow_values(path: pathlib.Path) -> Iterator[dict[str, object]]:
  """Yields rows of a file saved by `datasets`, in Arrow's stream format."""
  try:
    with pyarrow.memory_map(str(path)) as file, ipc.open_stream(file) as stream:
      for batch in stream:
        yield from batch.to_pylist()
  except (OSError, pyarrow.ArrowException) as error:
    raise _unreadable(path, error) from error


def _number(
  values: Iterable[dict[str, object]], *, file: str, name: str
) -> Iterator[rows.Row]:
  for number, row in enumerate(values, start=1):
    yield rows.Row(file, number, name, row)


def _unreadable(path: pathlib.Path, error: Exception) -> errors.DataError:
  return errors.DataError(
    "Cannot read data file.",
    where=str(path),
    why=f"{type(error).__name__}: {error}".splitlines()[0],
    fix="Copy it again: it may be incomplete.",
  )


_TEXT_READERS: dict[str, _Reader] = {
  ".jsonl": jsonl.read,
  ".json": jsonl.read,
  ".csv": delimited.read,
  ".tsv": delimited.read,
}
_READERS: dict[str, _Reader] = {
  ".parquet": _read_parquet,
  ".arrow": _read_arrow,
  **{
    ending + compression: read
    for ending, read in _TEXT_READERS.items()
    for compression in files.COMPRESSIONS
  },
}
_ENDINGS = (
  f"{', '.join(_TEXT_READERS)}, optionally compressed "
  f"({', '.join(filter(None, files.COMPRESSIONS))}), .parquet or .arrow"
)
