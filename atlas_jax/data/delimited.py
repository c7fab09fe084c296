# SPDX-License-Identifier: Apache-2.0
"""Reads rows from CSV and TSV files."""

from collections.abc import Iterator, Sequence
import csv
import itertools
import pathlib

from atlas_jax import errors
from atlas_jax.data import files, rows
from atlas_jax.data import quarantine as data_quarantine


def read(
  path: pathlib.Path, name: str, quarantine: data_quarantine.Quarantine
) -> Iterator[rows.Row]:
  """Yields the rows of a file, with one in memory at a time.

  The first row names the columns; those without a name are left out. Values are
  text, as written: `007` stays `007`. Quoted values may contain separators and
  newlines, and a quote as `""`. A row is located by its first line.

  Args:
    path: a file in UTF-8, separated by tabs if its name has the ending `.tsv`,
      else by commas, or by semicolons if there are more of them in the first
      line. See `files.opened` for compression.
    name: see `rows.Row`.
    quarantine: records malformed rows.

  Raises:
    errors.DataError: if the file cannot be read completely, or its first row is
      invalid.
  """
  file = str(path)
  lines = _lines(path)
  first = next(lines, "")
  delimiter = ";" if first.count(";") > first.count(",") else ","
  if ".tsv" in path.suffixes:
    delimiter = "\t"
  csv.field_size_limit(files.MAX_ROW_BYTES)
  records = csv.reader(
    itertools.chain([first], lines), delimiter=delimiter, strict=True
  )
  columns: list[str] = []
  while True:
    number = records.line_num + 1
    try:
      cells = next(records)
      if not columns:
        columns = _columns(cells)
      elif cells:  # Blank lines have none.
        yield rows.Row(file, number, name, _values(columns, cells))
    except StopIteration:
      return
    except (csv.Error, ValueError) as error:
      malformed = _malformed(str(error), f"{file}:{number}")
      if not columns:
        raise malformed from error
      quarantine.bad(file, number, malformed)


def _lines(path: pathlib.Path) -> Iterator[str]:
  """Yields lines; bytes that are not UTF-8 become lone surrogates."""
  encoding = "utf-8-sig"  # Only the first line may start with a BOM.
  with files.opened(path) as file:
    for line in files.lines(file):
      yield line.decode(encoding, errors="surrogateescape")
      encoding = "utf-8"


def _columns(cells: Sequence[str]) -> list[str]:
  """Returns the names of the columns.

  Raises:
    ValueError: if they are not distinct, or not UTF-8.
  """
  columns = [cell.strip() for cell in cells]
  named = [column for column in columns if column]
  _check_encoding(cells)
  if len(set(named)) < len(named):
    raise ValueError(f"The columns must be distinct, got {', '.join(named)}.")
  return columns


def _values(columns: Sequence[str], cells: Sequence[str]) -> dict[str, object]:
  """Returns a row's values by column.

  Raises:
    ValueError: if there are more or fewer than columns, or they are not UTF-8.
  """
  _check_encoding(cells)
  if len(cells) != len(columns):
    raise ValueError(
      f"The row has {len(cells)} values for {len(columns)} columns."
    )
  return {
    column: cell for column, cell in zip(columns, cells, strict=True) if column
  }


def _check_encoding(cells: Sequence[str]) -> None:
  if not rows.is_encodable("".join(cells)):
    raise ValueError("It is not UTF-8.")


def _malformed(why: str, where: str) -> errors.DataError:
  return errors.DataError(
    "Malformed row.",
    where=where,
    why=why,
    fix="Save the file as UTF-8, with the names of the columns in the first "
    "row, and quote values that contain separators, newlines or quotes.",
  )
