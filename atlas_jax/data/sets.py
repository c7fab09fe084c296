# SPDX-License-Identifier: Apache-2.0
"""Loads training and held-out batches from the names of datasets."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import pathlib
from typing import TypeVar

from absl import logging
import numpy as np

from atlas_jax import chat, errors, types
from atlas_jax.data import (
  formats,
  loader,
  packing,
  pairs,
  reading,
  rows,
  splits,
  views,
)
from atlas_jax.data import quarantine as data_quarantine

T = TypeVar("T")
Selection = reading.Selection


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
    _conversation_view(tokenizer, with_prompt=False),
    data=data,
    held_out=held_out,
    seed=seed,
    workdir=workdir,
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
    _conversation_view(tokenizer, with_prompt=True),
    data=data,
    held_out=held_out,
    seed=seed,
    workdir=workdir,
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
  quarantine = reading.quarantine(data, workdir)
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
  sets = _read_questions(data, quarantine=reading.quarantine(data, workdir))
  return [item.value for items in sets for item in items]


def samples(
  tokenizer: chat.Tokenizer,
  data: Selection,
  *,
  with_prompt: bool,
  workdir: pathlib.Path,
) -> list[tuple[str, str]]:
  """Returns conversations as they are trained.

  Args:
    tokenizer: has a chat template.
    data: the rows to read.
    with_prompt: whether only the last turn is trained, as by `completions`.
    workdir: directory of the list of invalid rows.

  Returns:
    Locations and texts, in which the tokens that count for the loss are in
    `[[ ]]`.
  """
  view = _conversation_view(tokenizer, with_prompt=with_prompt)
  found = reading.read(view, data, reading.quarantine(data, workdir))
  return [
    (item.where, view.show(item.value)) for items in found for item in items
  ]


def _conversation_view(
  tokenizer: chat.Tokenizer, *, with_prompt: bool
) -> reading.View[packing.Example]:
  """Returns how rows are tokenized; see `samples`."""

  def tokenize(row: rows.Row, fmt: formats.Format) -> packing.Example:
    if not fmt.text:
      messages = views.to_messages(row, fmt)
      token_ids, loss_mask = chat.tokenize(tokenizer, messages)
    elif with_prompt:
      raise errors.DataError(
        "Plain text has no prompt.",
        where=row.where,
        why="Completions can be sampled only after a prompt.",
        fix="Map the columns with --config.data.columns.question=COLUMN "
        "--config.data.columns.answer=COLUMN.",
      )
    else:
      text = views.to_text(row, fmt)
      token_ids, loss_mask = chat.tokenize_text(tokenizer, text)
    # As arrays: lists take ten times the memory.
    return np.asarray(token_ids, np.int32), np.asarray(loss_mask, np.bool_)

  def show(example: packing.Example) -> str:
    token_ids, loss_mask = map(np.array, example)
    if with_prompt:
      loss_mask[: pairs.last_turn(loss_mask)[0]] = False
    return (
      f"{len(token_ids)} tokens; the {loss_mask.sum()} in [[ ]] count for the "
      f"loss:\n{chat.marked(tokenizer, token_ids, loss_mask)}"
    )

  return reading.View(tokenize, lambda fmt: fmt.sft_part, show)


def _read_conversations(
  view: reading.View[packing.Example],
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
  left_out = reading.quarantine(data, workdir)
  read = functools.partial(reading.read, view, left_out=left_out)
  return _split(read, data, held_out, seed)


def _read_questions(
  data: Selection, *, quarantine: data_quarantine.Quarantine
) -> list[list[splits.Item[types.Question]]]:
  """Reads questions with unique row ids, which seed their random numbers."""
  view = reading.View(
    views.to_question, lambda fmt: fmt.questions_part, _shown_question
  )
  sets = reading.read(view, data, quarantine)
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


def _shown_question(question: types.Question) -> str:
  return f"question: {question.question}\nanswer: {question.answer}"


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
  mix = loader.Mix(sizes, weights, seed)
  if remainder == "drop":
    _warn_if_few(mix.num_rows, "batch.size", batch_size)
  return loader.Loader(
    {name: np.concatenate([a[name] for a in filled]) for name in filled[0]},
    names=names,
    mix=mix,
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
  mix = loader.Mix(tuple(sizes), weights, seed)
  if remainder == "drop":
    _warn_if_few(mix.num_rows, "batch.num_prompts", batch_size)
  return pairs.PairLoader(
    kept, names=names, mix=mix, batch_size=batch_size, remainder=remainder
  )


def _warn_if_few(num_rows: int, key: str, batch_size: int) -> None:
  if num_rows < batch_size:
    logging.warning(
      "There are %d rows for batches of %s=%d: every step trains on all of "
      "them. Reduce --config.%s for more steps in an epoch.",
      num_rows,
      key,
      batch_size,
      key,
    )
