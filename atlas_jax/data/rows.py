# SPDX-License-Identifier: Apache-2.0
"""Rows of a dataset, and access to text columns."""

from collections.abc import Mapping
import dataclasses
import math

from atlas_jax import errors


@dataclasses.dataclass(frozen=True)
class Row:
  """One row of a dataset.

  `file` and `line`, counted from 1, locate the row in error messages. `name` is
  the path of the file within its dataset, without its ending, so that it does
  not depend on where the dataset is stored.
  """

  file: str
  line: int
  name: str
  values: Mapping[str, object]

  @property
  def where(self) -> str:
    """Location for error messages."""
    return f"{self.file}:{self.line}"

  @property
  def row_id(self) -> str:
    """Default id of the row, unless it has an id column."""
    return f"{self.name}:{self.line}"


def text(row: Row, *columns: str) -> str:
  """Returns the text of the first of `columns` that is not empty.

  Raises:
    errors.DataError: if all are empty, or the value is not text.
  """
  for column in columns:
    found = optional_text(row, column)
    if found:
      return found
  raise errors.DataError(
    f"Missing column: {' or '.join(columns)}.",
    where=row.where,
    why=f"The row has columns: {listed(row)}.",
    fix="Map your columns, e.g. --config.data.columns.question=COLUMN "
    "--config.data.columns.answer=COLUMN, or set --config.data.format.",
  )


def is_given(value: object) -> bool:
  """Returns whether a value is neither null nor blank text."""
  return bool(value.strip()) if isinstance(value, str) else value is not None


def listed(row: Row) -> str:
  """Returns the names of a row's columns, for error messages."""
  names = [
    name if is_given(value) else f"{name} (empty)"
    for name, value in row.values.items()
  ]
  return ", ".join(names) or "none"


def optional_text(row: Row, column: str) -> str:
  """Returns the text of `column`; empty if it is absent, null or blank.

  Finite numbers are converted to text.

  Raises:
    errors.DataError: if it holds another type.
  """
  value = row.values.get(column)
  if value is None or (isinstance(value, str) and not value.strip()):
    return ""
  if isinstance(value, int | float) and not isinstance(value, bool):
    value = str(value) if math.isfinite(value) else value
  return as_text(value, name=f'Column "{column}"', where=row.where)


def as_text(value: object, *, name: str, where: str) -> str:
  """Returns `value` if it is text and not blank.

  Raises:
    errors.DataError: otherwise, with `name` and `where`.
  """
  if not isinstance(value, str):
    why = f"Expected text, got {type(value).__name__} {str(value)[:40]}."
  elif not value.strip():
    why = "The text is blank."
  elif "\0" in value:
    why = "The text contains a NUL character."
  elif not is_encodable(value):
    why = "The text contains a lone surrogate, which UTF-8 cannot encode."
  else:
    return value
  raise errors.DataError(
    f"{name} is not valid text.",
    where=where,
    why=why,
    fix="Convert it to text, or remove the row.",
  )


def is_encodable(value: str) -> bool:
  """Returns whether text can be encoded in UTF-8."""
  try:
    value.encode()
  except UnicodeEncodeError:
    return False
  return True
