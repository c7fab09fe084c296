# SPDX-License-Identifier: Apache-2.0
"""Reads the rows of datasets, and logs what was recognized."""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping
import dataclasses
import itertools
import pathlib
from typing import Any, Generic, TypeVar

from absl import logging
import jax

from atlas_jax import errors
from atlas_jax.data import columns as data_columns
from atlas_jax.data import formats, rows, sources, splits, views
from atlas_jax.data import quarantine as data_quarantine

T = TypeVar("T")
_MAX_SAMPLE_CHARS = 3000  # Of the one that is logged.


@dataclasses.dataclass(frozen=True)
class Selection:
  """The rows to read.

  Attributes:
    path: a dataset, see `sources.parse`, or several, separated by commas.
    format: name of its format, see `formats.find`; or one for each dataset.
    formats: custom formats, in addition to `formats.DATA_CONFIGS`.
    weights: share of each dataset; empty to use every row once.
    max_rows: number of rows to read of each dataset; 0 for all.
    max_bad_rows: number of invalid rows that are left out and listed in the
      workdir's `quarantine.jsonl`; more are an error.
    columns: see `columns.Columns`; of all datasets.
  """

  path: str
  format: str
  formats: Mapping[str, Mapping[str, Any]]  # Any: config values.
  weights: tuple[float, ...]
  max_rows: int
  max_bad_rows: int
  columns: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class View(Generic[T]):
  """What is made of each row.

  Attributes:
    of_row: maps a row to a value; None leaves it out.
    part_of: returns the default part of a format's dataset.
    show: renders a value for the log.
  """

  of_row: Callable[[rows.Row, formats.Format], T | None]
  part_of: Callable[[formats.Format], str]
  show: Callable[[T], str]


def quarantine(
  data: Selection, workdir: pathlib.Path
) -> data_quarantine.Quarantine:
  """Returns the record of invalid rows of a run."""
  # Every host reads all rows; only the first one lists invalid rows.
  path = workdir / "quarantine.jsonl" if jax.process_index() == 0 else None
  return data_quarantine.Quarantine(path, max_bad_rows=data.max_bad_rows)


def read(
  view: View[T], data: Selection, left_out: data_quarantine.Quarantine
) -> list[list[splits.Item[T]]]:
  """Reads each dataset and maps its rows.

  Args:
    view: of a row.
    data: the rows to read.
    left_out: records invalid rows, and counts all that are left out.

  Raises:
    errors.ConfigError: if a format is unknown.
    errors.DataError: if a dataset is invalid, or has no row that is kept.
  """
  paths = _listed(data.path)
  names = _listed(data.format)
  if len(names) not in (1, len(paths)):
    raise errors.ConfigError(
      f"data.format must name 1 or {len(paths)} formats, got {len(names)}.",
      where=f"--config.data.format={data.format}",
      why=f"There are {len(names)} formats for {len(paths)} datasets.",
      fix="Set one format for all datasets, or one for each.",
    )
  return [
    _read(view, path, name, data, left_out)
    for path, name in zip(
      paths, names * (len(paths) // len(names)), strict=True
    )
  ]


def _listed(text: str) -> list[str]:
  return [part.strip() for part in text.split(",")]


def _read(
  view: View[T],
  path: str,
  name: str,
  data: Selection,
  left_out: data_quarantine.Quarantine,
) -> list[splits.Item[T]]:
  """Reads one dataset, and logs its format, its columns and a sample."""
  source = sources.parse(path)
  known = formats.find(name, source.place, data.formats)
  found = sources.read(source, view.part_of(known) if known else "", left_out)
  mapping = data_columns.Columns(**data.columns)
  items: list[splits.Item[T]] = []
  names: collections.Counter[str] = collections.Counter()
  used: dict[str, str] = {}
  for row, fmt, item in itertools.islice(
    _view_all(view, found, known, mapping, left_out), data.max_rows or None
  ):
    names[formats.name_of(fmt, name)] += 1
    used = used or views.columns_used(row, fmt)
    items.append(item)
  error, counts = left_out.first, left_out.take_counts()
  if not items:
    raise errors.DataError(
      f"All rows are left out. {error.what if error else ''}".strip()
      if counts
      else "The dataset is empty.",
      where=error.where if error else path,
      why=f"{error.why if error else ''} Rows left out: {counts or 'none'}.",
      fix=error.fix
      if error
      else "Check the path, the format and its filters, and that the data was "
      "written completely.",
    )
  logging.info(
    "Read %d rows of %s in format %s (%s); left out: %s",
    len(items),
    path,
    ", ".join(names),
    ", ".join(f"{k}: {mapping.original(v)}" for k, v in used.items()),
    counts or "none",
  )
  logging.info(
    "Sample of %s:\n%s",
    items[0].where,
    shortened(view.show(items[0].value), _MAX_SAMPLE_CHARS),
  )
  return items


def _view_all(
  view: View[T],
  found: Iterable[rows.Row],
  known: formats.Format | None,
  mapping: data_columns.Columns,
  left_out: data_quarantine.Quarantine,
) -> Iterator[tuple[rows.Row, formats.Format, splits.Item[T]]]:
  """Yields the rows that are kept, with their formats and values."""
  for given in found:
    try:
      row = data_columns.join_turns(mapping.rename(given))
      fmt = known or formats.DATA_CONFIGS[formats.recognize(row)]
      column = views.excluded_by(row, fmt)
      if column:
        left_out.drop(f"filtered by {column}")
        continue
      problem = splits.key(views.to_problem(row, fmt))
      value = view.of_row(row, fmt)
    except errors.DataError as error:
      left_out.bad(given.file, given.line, error)
      continue
    if value is None:
      left_out.drop("without a match of answer_pattern")
    else:
      yield row, fmt, splits.Item(row.where, problem, value)


def shortened(text: str, max_chars: int) -> str:
  """Returns the text, with its middle replaced if it is too long."""
  if len(text) <= max_chars:
    return text
  head, tail = text[: max_chars * 2 // 3], text[-(max_chars // 3) :]
  return f"{head}\n... {len(text) - max_chars} more characters ...\n{tail}"
