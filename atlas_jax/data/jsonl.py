# SPDX-License-Identifier: Apache-2.0
"""Reads rows from files with one JSON object per line."""

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

# Longer lines are invalid: parsing them would take many times their size.
MAX_LINE_BYTES = 16 * 2**20


def read(
  path: pathlib.Path, name: str, quarantine: data_quarantine.Quarantine
) -> Iterator[rows.Row]:
  """Yields the rows of a file, with one in memory at a time.

  Only a line feed ends a line, since JSON strings may contain all other line
  separators. A last line without a line feed may still be being written: it is
  skipped if it is not valid JSON.

  Args:
    path: a file, compressed if its name ends with `.gz`.
    name: see `rows.Row`.
    quarantine: records malformed lines.

  Raises:
    errors.DataError: if the file cannot be read completely.
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
        logging.warning("Skipped the unfinished last line of %s.", file)
        quarantine.drop("unfinished last line")
    else:
      yield rows.Row(file, number, name, values)


def _lines(path: pathlib.Path) -> Iterator[bytes]:
  """Yields lines with their line feed; lines that are too long are cut."""
  try:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
      while line := file.readline(MAX_LINE_BYTES + 1):
        _pass_rest(line, file)
        yield line
  except (OSError, EOFError, zlib.error) as error:
    raise errors.DataError(
      "Cannot read data file.",
      where=str(path),
      why=f"{type(error).__name__}: {error}".splitlines()[0],
      fix="Check the path, relative to the working directory, and that a "
      "compressed file is complete.",
    ) from error


def _pass_rest(line: bytes, file: gzip.GzipFile | BinaryIO) -> None:
  """Reads past the rest of a line that was cut, without storing it."""
  while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
    line = file.readline(MAX_LINE_BYTES + 1) or b"\n"


def _parse(line: bytes, where: str) -> dict[str, object]:
  """Parses the object on a line."""
  if len(line) > MAX_LINE_BYTES:
    raise _malformed(f"The line exceeds {MAX_LINE_BYTES} bytes.", where)
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
    raise _malformed(f"Expected a JSON object, got a JSON {kind}.", where)
  # Escapes can produce lone surrogates, which UTF-8 files cannot represent.
  if b"\\u" in line and not rows.is_encodable(
    json.dumps(values, ensure_ascii=False)
  ):
    raise _malformed("The line contains a lone surrogate.", where)
  return values


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
  values = dict(pairs)
  if len(values) < len(pairs):
    raise ValueError("duplicate key")
  return values


def _constant(name: str) -> object:
  raise ValueError(f"{name} is not valid JSON")


def _malformed(why: str, where: str) -> errors.DataError:
  return errors.DataError(
    "Malformed line.",
    where=where,
    why=why,
    fix="Write one JSON object per line, in UTF-8. jq -c '.[]' converts a file "
    "that contains a list.",
  )
