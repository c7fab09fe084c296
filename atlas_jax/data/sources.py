# SPDX-License-Identifier: Apache-2.0
"""Rows from JSONL and Parquet files, folders of them, and Hub datasets.

A row keeps the place it came from, so that whatever is wrong with it, here or
later, can be told by file and line.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import json
import math
import pathlib
import re

import pyarrow
from pyarrow import parquet

from atlas_jax import errors, types

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::(.+))?")


@dataclasses.dataclass(frozen=True)
class Row:
  """One row of a dataset.

  `row_id` is the file's stem and the line, from 1: it does not change with the
  folder. `where` is what an error names.
  """

  row_id: str
  where: str
  values: Mapping[str, object]


def read(source: str) -> list[Row]:
  """Reads every row of a dataset.

  Args:
    source: a .jsonl or .json file with an object on each line, a .parquet file,
      a folder of such files, read in the order of their names, or a Hub dataset
      as "owner/name" or "owner/name:split".

  Raises:
    errors.DataError: if there is nothing to read, or a line is malformed.
  """
  path = pathlib.Path(source)
  hub_id = _HUB_ID.fullmatch(source)
  if path.is_dir():
    files = [file for file in sorted(path.iterdir()) if file.suffix in _READERS]
    rows = [row for file in files for row in _READERS[file.suffix](file)]
  elif path.suffix in _READERS:
    rows = _READERS[path.suffix](path)
  elif hub_id and not path.exists():
    # Imported here alone: `datasets` is an extra, and slow to import.
    from atlas_jax.data import hub

    values = hub.read(hub_id[1], split=hub_id[2])
    rows = _rows(source.split("/")[-1], source, values)
  else:
    raise errors.DataError(
      "The dataset is of no known kind.",
      where=source,
      why="It is no file that can be read, no folder, and no id on the Hub.",
      fix=f"Name a {', '.join(_READERS)} file, a folder of them, or a Hub "
      'dataset as "owner/name:split".',
    )
  if not rows:
    raise errors.DataError(
      "The dataset is empty.",
      where=source,
      why=f"No row was found, in files that end with {', '.join(_READERS)}.",
      fix="Check the path, and that whatever wrote it came to its end.",
    )
  return rows


def text(row: Row, *columns: str) -> str:
  """Returns the text in the first of `columns` that has a value.

  Raises:
    errors.DataError: if none has, or it is not text, or it is blank.
  """
  for column in columns:
    value = row.values.get(column)
    if value is not None:
      return as_text(value, name=f'Column "{column}"', where=row.where)
  present = [
    name if value is not None else f"{name} (null)"
    for name, value in row.values.items()
  ]
  raise errors.DataError(
    f"A row has no {' or '.join(columns)}.",
    where=row.where,
    why=f"Its columns are: {', '.join(present) or 'none'}.",
    fix="Rename the column in the file, or choose the format that names yours.",
  )


def optional_text(row: Row, column: str) -> str:
  """Returns the text in `column`; empty if there is none, or it is null."""
  return "" if row.values.get(column) in (None, "") else text(row, column)


def as_text(value: object, *, name: str, where: str) -> str:
  """Returns `value` if it is text with something in it.

  Raises:
    errors.DataError: otherwise, with `name` and `where`.
  """
  if not isinstance(value, str):
    why = f"It holds {type(value).__name__} {str(value)[:40]}."
  elif not value.strip():
    why = "It is blank."
  elif not _encodable(value):
    why = "It holds half of a surrogate pair, which is no character."
  else:
    return value
  raise errors.DataError(
    f"{name} is not usable text.",
    where=where,
    why=why,
    fix="Write it as text, or leave the row out.",
  )


def questions(rows: Iterable[Row]) -> list[types.Question]:
  """Reads problems with their reference answers.

  The answer is the first with a value of the columns `answer`, `ground_truth`
  and `solution`. `row_id` or `id` names a row, else its file and line do.
  `difficulty` and `solution` may be left out; the former and the name may be
  numbers.

  Raises:
    errors.DataError: if a row lacks one, or two rows have the same name.
  """
  seen: dict[str, str] = {}
  found = []
  for row in rows:
    row_id = _label(row, "row_id") or _label(row, "id") or row.row_id
    if row_id in seen:
      raise errors.DataError(
        f"Two rows are named {row_id!r}.",
        where=row.where,
        why=f"So is {seen[row_id]}; random numbers are drawn by this name.",
        fix="Give each row its own row_id, or none at all.",
      )
    seen[row_id] = row.where
    found.append(
      types.Question(
        row_id=row_id,
        question=text(row, "question"),
        answer=text(row, "answer", "ground_truth", "solution"),
        difficulty=_label(row, "difficulty"),
        solution=optional_text(row, "solution"),
      )
    )
  return found


def _label(row: Row, column: str) -> str:
  value = row.values.get(column)
  if isinstance(value, int | float) and math.isfinite(value):
    return str(value)
  return optional_text(row, column)


def _encodable(value: str) -> bool:
  try:
    value.encode()
  except UnicodeEncodeError:
    return False
  return True


def _read_jsonl(path: pathlib.Path) -> list[Row]:
  rows = []
  try:
    with path.open("rb") as file:
      for number, line in enumerate(file, start=1):
        if line.strip():
          where = f"{path}, line {number}"
          values = _parse_line(line, where)
          rows.append(Row(f"{path.stem}:{number}", where, values))
  except OSError as error:
    raise _unreadable(path, error) from error
  return rows


def _parse_line(line: bytes, where: str) -> dict[str, object]:
  try:
    values = json.loads(line.decode("utf-8-sig"))
  except (ValueError, RecursionError) as error:
    why = f"{type(error).__name__}: {error}"
  else:
    if isinstance(values, dict):
      return values
    why = f"It is a JSON {type(values).__name__}, not an object."
  raise errors.DataError(
    "A line is malformed.",
    where=where,
    why=why,
    fix="Write one JSON object on each line, in UTF-8.",
  )


def _read_parquet(path: pathlib.Path) -> list[Row]:
  try:
    table = parquet.ParquetFile(path).read().to_pylist()
  except (OSError, pyarrow.ArrowException) as error:
    raise _unreadable(path, error) from error
  return _rows(path.stem, str(path), table)


def _rows(name: str, where: str, table: list[dict[str, object]]) -> list[Row]:
  return [
    Row(f"{name}:{number}", f"{where}, row {number}", values)
    for number, values in enumerate(table, start=1)
  ]


def _unreadable(path: pathlib.Path, error: Exception) -> errors.DataError:
  return errors.DataError(
    "A data file cannot be read.",
    where=str(path),
    why=f"{type(error).__name__}: {error}".splitlines()[0],
    fix="Check the path, from the folder where the command was started.",
  )


_READERS = {
  ".jsonl": _read_jsonl,
  ".json": _read_jsonl,
  ".parquet": _read_parquet,
}
