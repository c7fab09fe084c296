# SPDX-License-Identifier: Apache-2.0
"""Opens data files, compressed or not."""

from collections.abc import Iterator
import contextlib
import gzip
import io
import pathlib
from typing import Any
import zlib

import pyarrow

from atlas_jax import errors

# Longer rows are invalid: parsing them would take many times their size.
MAX_ROW_BYTES = 16 * 2**20
# Endings that may follow that of a text file.
COMPRESSIONS = ("", ".gz", ".zst")


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[gzip.GzipFile | io.BufferedReader]:
  """Opens a file to read its bytes, decompressed as its ending says.

  Raises:
    errors.DataError: if it cannot be opened, or read completely.
  """
  try:
    with _open(path) as file:
      yield file
  except (OSError, EOFError, zlib.error) as error:
    raise errors.DataError(
      "Cannot read data file.",
      where=str(path),
      why=f"{type(error).__name__}: {error}".splitlines()[0],
      fix="Check the path, relative to the working directory, and that a "
      "compressed file is complete.",
    ) from error


def _open(path: pathlib.Path) -> gzip.GzipFile | io.BufferedReader:
  if path.suffix == ".gz":
    return gzip.open(path)
  if path.suffix == ".zst":
    # Any: Arrow's streams have the methods of a raw file, without its type.
    raw: Any = pyarrow.CompressedInputStream(str(path), "zstd")
    return io.BufferedReader(raw)
  return path.open("rb")


def lines(file: gzip.GzipFile | io.BufferedReader) -> Iterator[bytes]:
  """Yields lines with their line feed; lines that are too long are cut."""
  while line := file.readline(MAX_ROW_BYTES + 1):
    rest = line
    while len(rest) > MAX_ROW_BYTES and not rest.endswith(b"\n"):
      rest = file.readline(MAX_ROW_BYTES + 1) or b"\n"
    yield line
