# SPDX-License-Identifier: Apache-2.0
"""Reads rows from JSON files: an object per line, or one list of objects."""

from collections.abc import Iterator
import gzip
import io
import json
import pathlib
import re

from absl import logging

from atlas_jax import errors
from atlas_jax.data import files, rows
from atlas_jax.data import quarantine as data_quarantine

_CHUNK_BYTES = 2**20
# What may end a part of a list: outside of its strings, and inside of one.
_OUTSIDE = re.compile(rb'["{}\[\],]')
_INSIDE = re.compile(rb'["\\]')


def read(
  path: pathlib.Path, name: str, quarantine: data_quarantine.Quarantine
) -> Iterator[rows.Row]:
  """Yields the rows of a file, with one in memory at a time.

  A file that starts with `[` is one list, whose elements are counted from 1.

  In all others, only a line feed ends a line, since JSON strings may contain
  all other line separators. A last line without a line feed may still be being
  written: it is skipped if it is not valid JSON.

  Args:
    path: a file; see `files.opened` for compression.
    name: see `rows.Row`.
    quarantine: records malformed lines and elements.

  Raises:
    errors.DataError: if the file cannot be read completely.
  """
  file = str(path)
  for number, text, is_whole in _texts(path):
    try:
      values = _parse(text, f"{file}:{number}")
    except errors.DataError as error:
      if is_whole or len(text) > files.MAX_ROW_BYTES:
        quarantine.bad(file, number, error)
      else:
        logging.warning("Skipped the unfinished last line of %s.", file)
        quarantine.drop("unfinished last line")
    else:
      yield rows.Row(file, number, name, values)


def _texts(path: pathlib.Path) -> Iterator[tuple[int, bytes, bool]]:
  """Yields number and text of each row, and whether it is surely complete."""
  with files.opened(path) as file:
    start = file.peek(_CHUNK_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"["):
      for number, text in enumerate(_elements(file, str(path)), start=1):
        yield number, text, True
      return
    for number, line in enumerate(files.lines(file), start=1):
      if line.strip():
        yield number, line, line.endswith(b"\n")


def _elements(
  file: gzip.GzipFile | io.BufferedReader, where: str
) -> Iterator[bytes]:
  """Yields the texts of a list's elements; those too long are cut."""
  element, depth = bytearray(), 0
  pieces = _pieces(file)
  for piece, mark in pieces:
    # text     [ {"a": 1}, {"a": 2} ]
    # depth    1 2      1  2      1 0
    # borders  *         *          *
    depth += (mark in (b"{", b"[")) - (mark in (b"}", b"]"))
    if (depth, mark) not in ((1, b"["), (1, b","), (0, b"]")):
      element += piece
      del element[files.MAX_ROW_BYTES + 1 :]
      continue
    element += piece[:-1]
    if mark == b"," or (mark == b"]" and element.strip()):
      yield bytes(element)
    element.clear()
    if mark == b"]":
      if any(rest.strip() for rest, _ in pieces):
        raise _bad_list("Text follows the list.", where)
      return
  raise _bad_list("The list does not end.", where)


def _pieces(
  file: gzip.GzipFile | io.BufferedReader,
) -> Iterator[tuple[bytes, bytes]]:
  """Yields the text up to each bracket or comma, with it as the second item.

  Those in strings are not counted. The second item is empty at the end of a
  chunk.
  """
  is_string, skipped = False, 0
  while chunk := file.read(_CHUNK_BYTES):
    start, place = 0, skipped
    while found := (_INSIDE if is_string else _OUTSIDE).search(chunk, place):
      place = found.end()
      if found[0] == b"\\":
        place += 1  # Passes the escaped byte, which may be in the next chunk.
      elif found[0] == b'"':
        is_string = not is_string
      else:
        yield chunk[start:place], found[0]
        start = place
    yield chunk[start:], b""
    skipped = max(place - len(chunk), 0)


def _parse(text: bytes, where: str) -> dict[str, object]:
  """Parses the object of a row."""
  if len(text) > files.MAX_ROW_BYTES:
    raise _malformed(f"The row exceeds {files.MAX_ROW_BYTES} bytes.", where)
  try:
    values = json.loads(
      text.decode("utf-8-sig"),
      object_pairs_hook=_object,
      parse_constant=_constant,
    )
  except (ValueError, RecursionError) as error:
    raise _malformed(f"{type(error).__name__}: {error}", where) from error
  if not isinstance(values, dict):
    kind = type(values).__name__
    raise _malformed(f"Expected a JSON object, got a JSON {kind}.", where)
  # Escapes can produce lone surrogates, which UTF-8 files cannot represent.
  if b"\\u" in text and not rows.is_encodable(
    json.dumps(values, ensure_ascii=False)
  ):
    raise _malformed("The row contains a lone surrogate.", where)
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
    "Malformed row.",
    where=where,
    why=why,
    fix="Write one JSON object per line, or one list of objects, in UTF-8.",
  )


def _bad_list(why: str, where: str) -> errors.DataError:
  return errors.DataError(
    "Malformed JSON list.",
    where=where,
    why=why,
    fix="Write the whole file as one list of objects, or one object per line "
    "without a list around them. Copy it again if it may be incomplete.",
  )
