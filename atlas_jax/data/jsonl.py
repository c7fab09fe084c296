# SPDX-License-Identifier: Apache-2.0
"""Rows out of files with one JSON object on each line."""

from collections.abc import Iterator
import gzip
import json
import pathlib
from typing import BinaryIO
import zlib

from absl import logging

from atlas_jax import errors
from atlas_jax.data import quarantine as data_quarantine
from atlas_jax.data import rows

# A longer line is no row: reading it would take many times that in memory.
MAX_LINE_BYTES = 16 * 2**20


def read(
  path: pathlib.Path, name: str, quarantine: data_quarantine.Quarantine
) -> Iterator[rows.Row]:
  """Yields the rows of a file, one in memory at a time.

  Lines end with a line feed alone: JSON may hold every other line separator. A
  last line without one is still being written, and passed over if it is not
  whole.

  Args:
    path: a file; one that ends with `.gz` is compressed.
    name: see `rows.Row`.
    quarantine: takes malformed lines.

  Raises:
    errors.DataError: if the file cannot be read to its end.
  """
  file = str(path)
  for number, line in enumerate(_lines(path), start=1):
    if not line.strip():
      continue
    try:
      values = _parse(line, f"{file}:{number}")
    except errors.DataError as error:
      if line.endswith(b"\n") or len(line) > MAX_LINE_BYTES:
        quarantine.bad(file, number, error)
      else:
        logging.warning(
          "Passed over the last line of %s: it has no end yet.", file
        )
        quarantine.drop("a last line without an end")
    else:
      yield rows.Row(file, number, name, values)


def _lines(path: pathlib.Path) -> Iterator[bytes]:
  """Yields lines with their line feed; one that is too long is cut."""
  try:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
      while line := file.readline(MAX_LINE_BYTES + 1):
        _pass_rest(line, file)
        yield line
  except (OSError, EOFError, zlib.error) as error:
    raise errors.DataError(
      "A data file cannot be read.",
      where=str(path),
      why=f"{type(error).__name__}: {error}".splitlines()[0],
      fix="Check the path, from the folder where the command was started, and "
      "that a compressed file was copied whole.",
    ) from error


def _pass_rest(line: bytes, file: gzip.GzipFile | BinaryIO) -> None:
  """Moves to the next line without keeping what is left of this one."""
  while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
    line = file.readline(MAX_LINE_BYTES + 1) or b"\n"


def _parse(line: bytes, where: str) -> dict[str, object]:
  """Returns the object on a line."""
  if len(line) > MAX_LINE_BYTES:
    raise _malformed(f"It is longer than {MAX_LINE_BYTES} bytes.", where)
  try:
    values = json.loads(
      line.decode("utf-8-sig"),
      object_pairs_hook=_object,
      parse_constant=_constant,
    )
  except (ValueError, RecursionError) as error:
    raise _malformed(f"{type(error).__name__}: {error}", where) from error
  if not isinstance(values, dict):
    kind = type(values).__name__
    raise _malformed(f"It is a JSON {kind}, not an object.", where)
  # An escape can name half of a surrogate pair, which no file could hold.
  if b"\\u" in line and not rows.is_encodable(
    json.dumps(values, ensure_ascii=False)
  ):
    raise _malformed("It holds half of a surrogate pair.", where)
  return values


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
  values = dict(pairs)
  if len(values) < len(pairs):
    raise ValueError("A key is there twice.")
  return values


def _constant(name: str) -> object:
  raise ValueError(f"{name} is no JSON.")


def _malformed(why: str, where: str) -> errors.DataError:
  return errors.DataError(
    "A line is malformed.",
    where=where,
    why=why,
    fix="Write one JSON object on each line, in UTF-8; for a file that holds "
    "one list, jq -c '.[]' does so.",
  )
