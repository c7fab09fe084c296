# SPDX-License-Identifier: Apache-2.0
"""Weights on disk in either format, by name; read one tensor at a time."""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
import pathlib
from typing import Literal

import numpy as np

from atlas_jax import errors
from atlas_jax.models import decoder
from conversion import orbax_step, rules, shards

_LAYERS = "layers/"


@dataclasses.dataclass(frozen=True)
class Weight:
  """One tensor; `read` returns its values."""

  dtype: np.dtype
  shape: tuple[int, ...]
  read: Callable[[], np.ndarray]


Weights = Mapping[str, Weight]


def of_directory(directory: pathlib.Path) -> Weights:
  """Lists the tensors of a directory in Hugging Face format.

  Raises:
    errors.CheckpointError: see `shards.open_directory`.
  """
  return {
    name: Weight(
      tensor.dtype, tensor.shape, functools.partial(shards.read, tensor)
    )
    for name, tensor in shards.open_directory(directory).items()
  }


def of_step(step: pathlib.Path, model: decoder.Model | None) -> Weights:
  """Lists the parameters of a checkpoint, which must be intact.

  Args:
    step: as `orbax_step.find` returns it.
    model: names and shapes are those of its Hugging Face files. If None, they
      are those of the parameters, with each layer separate.

  Raises:
    errors.CheckpointError: if the checkpoint is unreadable or does not match
      the model.
  """
  read = functools.partial(orbax_step.read_one, step)
  if model is None:
    return dict(_by_layer(step, _cached(read, num_held=1)))
  orbax_step.check_model(step, model)
  parts: dict[str, list[rules.Piece]] = {}
  for piece in rules.pieces(model):
    parts.setdefault(piece.name, []).append(piece)
  # Queries, keys and values may share one tensor of a file.
  num_held = max(len(shared) for shared in parts.values())
  return dict(_by_file(step, model, parts, _cached(read, num_held)))


def _cached(
  read: Callable[[str], np.ndarray], num_held: int
) -> Callable[[str], np.ndarray]:
  """Returns `read` with a cache of the last `num_held` arrays.

  All layers of a parameter are one array. The oldest is freed before the next
  is read, since each may be a large part of the model.
  """
  held: dict[str, np.ndarray] = {}

  def get(path: str) -> np.ndarray:
    if path not in held:
      if len(held) == num_held:
        del held[next(iter(held))]
      held[path] = read(path)
    return held[path]

  return get


def _by_layer(
  step: pathlib.Path, read: Callable[[str], np.ndarray]
) -> Iterator[tuple[str, Weight]]:
  def layer(path: str, number: int) -> np.ndarray:
    return read(path)[number]

  for path, leaf in orbax_step.param_headers(step).items():
    shape, dtype = tuple(leaf.shape), np.dtype(leaf.dtype)
    if not path.startswith(_LAYERS):
      yield path, Weight(dtype, shape, functools.partial(read, path))
      continue
    for number in range(shape[0]):
      name = path.replace(_LAYERS, f"{_LAYERS}{number}/", 1)
      yield (
        name,
        Weight(dtype, shape[1:], functools.partial(layer, path, number)),
      )


def _by_file(
  step: pathlib.Path,
  model: decoder.Model,
  parts: Mapping[str, list[rules.Piece]],
  read: Callable[[str], np.ndarray],
) -> Iterator[tuple[str, Weight]]:
  def fetch(parts: list[rules.Piece]) -> np.ndarray:
    rows = [rules.to_hf(p.rule, read(p.rule.path)[p.index]) for p in parts]
    return rows[0] if len(rows) == 1 else np.concatenate(rows)

  headers = orbax_step.param_headers(step)
  for name, shape in rules.shapes(model).items():
    dtype = np.dtype(headers[parts[name][0].rule.path].dtype)
    yield name, Weight(dtype, shape, functools.partial(fetch, parts[name]))


def cast(weights: Weights, dtype: str) -> Weights:
  """Returns the same weights in another precision."""

  def read(weight: Weight) -> np.ndarray:
    return weight.read().astype(dtype, copy=False)

  return {
    name: Weight(np.dtype(dtype), weight.shape, functools.partial(read, weight))
    for name, weight in weights.items()
  }


def rounded_like(weights: Weights, like: Weights) -> Weights:
  """Returns the same weights in the precisions of those of the same name."""
  return {
    name: cast({name: weight}, like[name].dtype.name)[name]
    if name in like
    else weight
    for name, weight in weights.items()
  }


def dtype_of(
  weights: Weights, where: pathlib.Path
) -> Literal["float32", "bfloat16"]:
  """Returns the common dtype of all tensors.

  Raises:
    errors.ConfigError: if they have several dtypes, or one that is not
      supported.
  """
  names = {weight.dtype.name for weight in weights.values()}
  if names not in ({"float32"}, {"bfloat16"}):
    raise errors.ConfigError(
      "--dtype is required for this input.",
      where=str(where),
      why=f"Its tensors are {' and '.join(sorted(names))}.",
      fix="Add --dtype=float32 or --dtype=bfloat16.",
    )
  return "float32" if names == {"float32"} else "bfloat16"
