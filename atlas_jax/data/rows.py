# SPDX-License-Identifier: Apache-2.0
"""A row of a dataset, and the text in its columns."""

from collections.abc import Mapping
import dataclasses
import math

from atlas_jax import errors


@dataclasses.dataclass(frozen=True)
class Row:
  """One row of a dataset.

  `file` and `line`, from 1, are the place it came from, so that whatever is
  wrong with it, here or later, can be told. `name` is the file's within its
  dataset, without an ending: it does not change with the folder.
  """

  file: str
  line: int
  name: str
  values: Mapping[str, object]

  @property
  def where(self) -> str:
    """What an error names."""
    return f"{self.file}:{self.line}"

  @property
  def row_id(self) -> str:
    """What the row is called if it does not name itself."""
    return f"{self.name}:{self.line}"


def text(row: Row, *columns: str) -> str:
  """Returns the text in the first of `columns` that is not empty.

  Raises:
    errors.DataError: if none has any, or what it has is not text.
  """
  for column in columns:
    found = optional_text(row, column)
    if found:
      return found
  present = [
    name if value not in (None, "") else f"{name} (empty)"
    for name, value in row.values.items()
  ]
  raise errors.DataError(
    f"A row has no {' or '.join(columns)}.",
    where=row.where,
    why=f"Its columns are: {', '.join(present) or 'none'}.",
    fix="Choose the format that names its columns, or write one; see "
    "--config.data.format.",
  )


def optional_text(row: Row, column: str) -> str:
  """Returns the text in `column`; empty if it is absent, null or blank.

  A number is its digits.

  Raises:
    errors.DataError: if it holds something else.
  """
  value = row.values.get(column)
  if value is None or (isinstance(value, str) and not value.strip()):
    return ""
  if isinstance(value, int | float) and not isinstance(value, bool):
    value = str(value) if math.isfinite(value) else value
  return as_text(value, name=f'Column "{column}"', where=row.where)


def as_text(value: object, *, name: str, where: str) -> str:
  """Returns `value` if it is text with something in it.

  Raises:
    errors.DataError: otherwise, with `name` and `where`.
  """
  if not isinstance(value, str):
    why = f"It holds {type(value).__name__} {str(value)[:40]}."
  elif not value.strip():
    why = "It is blank."
  elif "\0" in value:
    why = "It holds a NUL character."
  elif not is_encodable(value):
    why = "It holds half of a surrogate pair, which is no character."
  else:
    return value
  raise errors.DataError(
    f"{name} is not usable text.",
    where=where,
    why=why,
    fix="Write it as text, or leave the row out.",
  )


def is_encodable(value: str) -> bool:
  """Tells whether text has a place in a UTF-8 file."""
  try:
    value.encode()
  except UnicodeEncodeError:
    return False
  return True
