# SPDX-License-Identifier: Apache-2.0
"""Loads training and held-out batches from the names of datasets."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import functools
import itertools
import pathlib
from typing import Any, TypeVar

from absl import logging
import jax
import numpy as np

from atlas_jax import chat, errors, types
from atlas_jax.data import (
  formats,
  loader,
  packing,
  pairs,
  rows,
  sources,
  splits,
)
from atlas_jax.data import quarantine as data_quarantine

T = TypeVar("T")


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
  """

  path: str
  format: str
  formats: Mapping[str, Mapping[str, Any]]  # Any: config values.
  weights: tuple[float, ...]
  max_rows: int
  max_bad_rows: int


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """The rows to hold out from training; none if neither field is set.

  Attributes:
    path: like `Selection.path`; rows of the training set with the same problems
      are removed from it.
    fraction: fraction of the training set's problems.
  """

  path: str
  fraction: float

  def __post_init__(self) -> None:
    """Validates that at most one field is set."""
    if self.path and self.fraction:
      raise errors.ConfigError(
        "Only one of held_out.path and held_out.fraction can be set, got "
        f"path={self.path!r} and fraction={self.fraction}.",
        where="--config.held_out",
        why="Each defines a held-out set.",
        fix="Unset one of them.",
      )


@dataclasses.dataclass(frozen=True)
class Layout:
  """How conversations are packed into rows.

  Attributes:
    length: tokens in a row.
    packed: whether a row holds several conversations, or one.
    too_long: how to handle conversations longer than a row.
  """

  length: int
  packed: bool
  too_long: packing.TooLong


def conversations(
  tokenizer: chat.Tokenizer,
  *,
  data: Selection,
  held_out: HeldOut,
  layout: Layout,
  batch_size: int,
  seed: int,
  workdir: pathlib.Path,
  share: loader.Share = loader.WHOLE,
) -> tuple[loader.Loader, loader.Loader]:
  """Reads, tokenizes and packs the training and the held-out set.

  Args:
    tokenizer: has a chat template.
    data: the rows to read.
    held_out: the rows to hold out from training.
    layout: how conversations are packed into rows.
    batch_size: rows per step.
    seed: of the order, and of the held-out selection.
    workdir: directory of the list of invalid rows.
    share: the slice of each batch that this process loads.

  Raises:
    errors.ConfigError: if nothing is held out, or a format is unknown.
    errors.DataError: if the data is invalid.
  """
  sets, kept_out = _read_conversations(
    tokenizer, data=data, held_out=held_out, seed=seed, workdir=workdir
  )
  load = functools.partial(
    _load, layout=layout, batch_size=batch_size, share=share
  )
  return (
    load(sets, weights=tuple(data.weights), seed=seed, remainder="drop"),
    load([kept_out], weights=(), seed=seed, remainder="pad"),
  )


def completions(
  tokenizer: chat.Tokenizer,
  *,
  data: Selection,
  held_out: HeldOut,
  layout: Layout,
  max_new_tokens: int,
  batch_size: int,
  seed: int,
  workdir: pathlib.Path,
) -> tuple[pairs.PairLoader, pairs.PairLoader]:
  """Reads conversations as prompts with their last completion.

  Args:
    tokenizer: has a chat template.
    data: the rows to read.
    held_out: the rows to hold out from training.
    layout: how pairs are packed into rows later.
    max_new_tokens: see `pairs.split`.
    batch_size: pairs per step.
    seed: of the order, and of the held-out selection.
    workdir: directory of the list of invalid rows.

  Raises:
    errors.ConfigError: if nothing is held out, or a format is unknown.
    errors.DataError: if the data is invalid.
  """
  sets, kept_out = _read_conversations(
    tokenizer, data=data, held_out=held_out, seed=seed, workdir=workdir
  )
  load = functools.partial(
    _load_pairs,
    split=functools.partial(
      pairs.split,
      length=layout.length,
      max_new_tokens=max_new_tokens,
      too_long=layout.too_long,
    ),
    batch_size=batch_size,
    seed=seed,
  )
  return (
    load(sets, weights=tuple(data.weights), remainder="drop"),
    load([kept_out], weights=(), remainder="pad"),
  )


def questions(
  data: Selection,
  held_out: HeldOut,
  *,
  batch_size: int,
  seed: int,
  workdir: pathlib.Path,
) -> tuple[loader.QuestionLoader, list[types.Question]]:
  """Reads the training questions, and the held-out ones.

  Args:
    data: the rows to read.
    held_out: the rows to hold out from training.
    batch_size: questions per step.
    seed: of the order, and of the held-out selection.
    workdir: directory of the list of invalid rows.

  Raises:
    errors.ConfigError: if a format is unknown.
    errors.DataError: if the data is invalid.
  """
  quarantine = _quarantine(data, workdir)
  sets, kept_out = _split(
    functools.partial(_read_questions, quarantine=quarantine),
    data,
    held_out,
    seed,
  )
  found = [item.value for items in sets for item in items]
  mix = loader.Mix(tuple(map(len, sets)), tuple(data.weights), seed)
  return (
    loader.QuestionLoader(found, mix=mix, batch_size=batch_size),
    [item.value for item in kept_out],
  )


def all_questions(
  data: Selection, *, workdir: pathlib.Path
) -> list[types.Question]:
  """Reads all questions in the order of the files; see `questions`."""
  sets = _read_questions(data, quarantine=_quarantine(data, workdir))
  return [item.value for items in sets for item in items]


def _read_conversations(
  tokenizer: chat.Tokenizer,
  *,
  data: Selection,
  held_out: HeldOut,
  seed: int,
  workdir: pathlib.Path,
) -> tuple[
  list[list[splits.Item[packing.Example]]], list[splits.Item[packing.Example]]
]:
  """Reads and tokenizes the training sets and the held-out rows."""
  if not held_out.path and not held_out.fraction:
    raise errors.ConfigError(
      "One of held_out.path and held_out.fraction must be set.",
      where="--config.held_out",
      why="Evaluation requires a held-out set.",
      fix="Set one of them, e.g. --config.held_out.fraction=0.05.",
    )

  def tokenize(row: rows.Row, fmt: formats.Format) -> packing.Example:
    messages = formats.to_messages(row, fmt)
    token_ids, loss_mask = chat.tokenize(tokenizer, messages)
    # As arrays: lists take ten times the memory.
    return np.asarray(token_ids, np.int32), np.asarray(loss_mask, np.bool_)

  def read(selection: Selection) -> list[list[splits.Item[packing.Example]]]:
    return _read(tokenize, selection, lambda fmt: fmt.sft_part, quarantine)

  quarantine = _quarantine(data, workdir)
  return _split(read, data, held_out, seed)


def _quarantine(
  data: Selection, workdir: pathlib.Path
) -> data_quarantine.Quarantine:
  # Every host reads all rows; only the first one lists invalid rows.
  path = workdir / "quarantine.jsonl" if jax.process_index() == 0 else None
  return data_quarantine.Quarantine(path, max_bad_rows=data.max_bad_rows)


def _read_questions(
  data: Selection, *, quarantine: data_quarantine.Quarantine
) -> list[list[splits.Item[types.Question]]]:
  """Reads questions with unique row ids, which seed their random numbers."""
  sets = _read(
    formats.to_question, data, lambda fmt: fmt.questions_part, quarantine
  )
  for number, items in enumerate(sets[1:], start=2):
    for i, item in enumerate(items):
      row_id = f"{number}/{item.value.row_id}"
      renamed = dataclasses.replace(item.value, row_id=row_id)
      items[i] = item._replace(value=renamed)
  seen: set[str] = set()
  for row_id in (item.value.row_id for items in sets for item in items):
    if row_id in seen:
      raise errors.DataError(
        f"row_id must be unique, got {row_id!r} twice.",
        where=data.path,
        why="A question's random numbers are seeded with its row_id.",
        fix="Set a different row_id for each row, or none at all.",
      )
    seen.add(row_id)
  return sets


def _read(
  view: Callable[[rows.Row, formats.Format], T | None],
  data: Selection,
  part_of: Callable[[formats.Format], str],
  quarantine: data_quarantine.Quarantine,
) -> list[list[splits.Item[T]]]:
  """Reads each dataset and maps its rows with `view`.

  Args:
    view: maps a row to a value; None leaves it out.
    data: the rows to read.
    part_of: returns the default part of a format's dataset.
    quarantine: records invalid rows, and counts all that are left out.
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
  sets = []
  for path, name in zip(paths, names * (len(paths) // len(names)), strict=True):
    source = sources.parse(path)
    fmt = formats.find(name, source.place, data.formats)
    found = sources.read(source, part_of(fmt), quarantine)
    made = _view_all(view, found, fmt, quarantine)
    items = list(itertools.islice(made, data.max_rows or None))
    left_out = quarantine.take_counts()
    if not items:
      raise errors.DataError(
        "All rows are left out." if left_out else "The dataset is empty.",
        where=path,
        why=f"Rows left out: {left_out or 'none'}.",
        fix="Check the path, the format and its filters, and that the data was "
        "written completely.",
      )
    logging.info(
      "Read %d rows of %s; left out: %s", len(items), path, left_out or "none"
    )
    sets.append(items)
  return sets


def _view_all(
  view: Callable[[rows.Row, formats.Format], T | None],
  found: Iterable[rows.Row],
  fmt: formats.Format,
  quarantine: data_quarantine.Quarantine,
) -> Iterator[splits.Item[T]]:
  """Yields the values of `view` for the rows that are kept."""
  for row in found:
    try:
      column = formats.excluded_by(row, fmt)
      if column:
        quarantine.drop(f"filtered by {column}")
        continue
      problem = splits.key(formats.to_problem(row, fmt))
      value = view(row, fmt)
    except errors.DataError as error:
      quarantine.bad(row.file, row.line, error)
      continue
    if value is None:
      quarantine.drop("without a match of answer_pattern")
    else:
      yield splits.Item(row.where, problem, value)


def _split(
  read: Callable[[Selection], list[list[splits.Item[T]]]],
  data: Selection,
  held_out: HeldOut,
  seed: int,
) -> tuple[list[list[splits.Item[T]]], list[splits.Item[T]]]:
  """Returns the training sets and the held-out rows."""
  sets = read(data)
  if held_out.fraction:
    return splits.by_fraction(sets, held_out.fraction, seed)
  if not held_out.path:
    return sets, []
  kept_out = read(dataclasses.replace(data, path=held_out.path, max_rows=0))
  held_out_items = [item for items in kept_out for item in items]
  left = [splits.without(items, held_out_items) for items in sets]
  num_shared = sum(map(len, sets)) - sum(map(len, left))
  if num_shared:
    logging.warning(
      "Removed %d training rows whose problems are held out.", num_shared
    )
  if not all(left):
    raise errors.DataError(
      "A dataset has no row left to train on.",
      where=data.path,
      why=f"The problems of {num_shared} rows are held out.",
      fix="Hold out other problems: set --config.held_out.path.",
    )
  return left, held_out_items


def _listed(text: str) -> list[str]:
  return [part.strip() for part in text.split(",")]


def _load(
  sets: Sequence[Sequence[splits.Item[packing.Example]]],
  *,
  layout: Layout,
  weights: tuple[float, ...],
  batch_size: int,
  seed: int,
  remainder: loader.Remainder,
  share: loader.Share,
) -> loader.Loader:
  """Packs the conversations of each set into rows, and mixes the rows."""
  fill = packing.pack if layout.packed else packing.pad
  filled, names = [], []
  for items in sets:
    made = fill(
      [item.value for item in items], layout.length, too_long=layout.too_long
    )
    logging.info(
      "Packed %d conversations into %d rows of %d tokens; %d too long",
      len(items),
      len(made.members),
      layout.length,
      made.num_too_long,
    )
    filled.append(made.arrays)
    names += ["; ".join(items[i].where for i in row) for row in made.members]
  sizes = tuple(len(arrays["token_ids"]) for arrays in filled)
  return loader.Loader(
    {name: np.concatenate([a[name] for a in filled]) for name in filled[0]},
    names=names,
    mix=loader.Mix(sizes, weights, seed),
    batch_size=batch_size,
    remainder=remainder,
    share=share,
  )


def _load_pairs(
  sets: Sequence[Sequence[splits.Item[packing.Example]]],
  *,
  split: Callable[[packing.Example], tuple[np.ndarray, int] | None],
  weights: tuple[float, ...],
  batch_size: int,
  seed: int,
  remainder: loader.Remainder,
) -> pairs.PairLoader:
  """Splits the conversations of each set, and mixes the pairs."""
  kept, names, sizes = [], [], []
  for items in sets:
    found = [(item.where, split(item.value)) for item in items]
    fitting = [(where, pair) for where, pair in found if pair is not None]
    logging.info(
      "Read %d prompts with completions; %d too long",
      len(fitting),
      len(found) - len(fitting),
    )
    if not fitting:
      raise errors.DataError(
        "All prompts with their completions are longer than a row.",
        where=f"{len(found)} conversations",
        why="A prompt must fit with its completion, and with what is sampled.",
        fix="Increase --config.packing.length, or sample fewer tokens.",
      )
    names += [where for where, _ in fitting]
    kept += [pair for _, pair in fitting]
    sizes.append(len(fitting))
  return pairs.PairLoader(
    kept,
    names=names,
    mix=loader.Mix(tuple(sizes), weights, seed),
    batch_size=batch_size,
    remainder=remainder,
  )
