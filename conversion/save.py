# SPDX-License-Identifier: Apache-2.0
"""Saves parameters as a Hugging Face directory that transformers can load.

All files are written to a private directory, read back and compared before the
directory gets its final name.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import functools
import math
import pathlib
import shutil
from typing import Any, Literal

from absl import logging
import jax
import jax.sharding as js
import numpy as np

from atlas_jax import errors
from atlas_jax.models import decoder
from conversion import card, load, process_group, rules, shards, target

# Returns a tensor by its Hugging Face name.
Fetch = Callable[[str], np.ndarray]

_GENERATION = "generation_config.json"
# Files that are copied unchanged.
_CARRIED = (
  "tokenizer*",
  "vocab.json",
  "merges.txt",
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template*",
  _GENERATION,
  "LICENSE*",
  "NOTICE*",
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def save(  # noqa: PLR0913 - all are settings of an export.
  directory: pathlib.Path,
  params: decoder.Params,
  model: decoder.Model,
  *,
  source: pathlib.Path,
  dtype: Literal["float32", "bfloat16"],
  max_shard_bytes: int,
  about: card.Card,
  overwrite: bool,
  chat_template: str = "",
  progress: Callable[[int], None] = lambda _: None,
  share: process_group.ProcessShare = process_group.ALONE,
) -> None:
  """Saves the parameters of `model`, which may be sharded over processes.

  The other arguments are those of `write`.
  """
  tensors = Tensors(params, model, dtype)
  write(
    directory,
    tensors.fetch,
    model,
    source=source,
    dtype=dtype,
    max_shard_bytes=max_shard_bytes,
    about=about,
    overwrite=overwrite,
    chat_template=chat_template,
    progress=progress,
    share=share,
    on_skip=tensors.join_fetch,
  )


def write(  # noqa: PLR0913 - all are settings of an export.
  directory: pathlib.Path,
  fetch: Fetch,
  model: decoder.Model,
  *,
  source: pathlib.Path,
  dtype: Literal["float32", "bfloat16"],
  max_shard_bytes: int,
  about: card.Card,
  overwrite: bool,
  chat_template: str = "",
  progress: Callable[[int], None] = lambda _: None,
  share: process_group.ProcessShare = process_group.ALONE,
  on_skip: Callable[[str], object] = lambda _: None,
) -> None:
  """Writes a model directory, completely or not at all.

  Args:
    directory: the target.
    fetch: returns a tensor of the model's files by name.
    model: the model that the tensors belong to.
    source: Hugging Face directory of the model; its other files are copied.
    dtype: of the written tensors.
    max_shard_bytes: see `shards.layout`.
    about: contents of the model card.
    overwrite: replaces `directory` once the new one is complete.
    chat_template: replaces that of the source; empty to keep it.
    progress: called with the bytes of each tensor before it is written.
    share: this process's share; all processes call this and see the disk.
    on_skip: see `shards.write_files`.

  Raises:
    errors.ConfigError: if the target is in use.
    errors.CheckpointError: if `source` is incomplete or of another shape, a
      weight is not finite, the disk is full, or the files read back differ.
      An error in one process is raised in all.
  """
  shapes = rules.shapes(model)
  files = shards.layout(shapes, dtype=dtype, max_shard_bytes=max_shard_bytes)
  fetch = _reporting(fetch, progress)

  def write_part(partial: pathlib.Path) -> dict[str, str]:
    with target.disk_errors(directory):
      digests = shards.write_files(
        partial, files, shapes, fetch, dtype=dtype, share=share, on_skip=on_skip
      )
    if share.count > 1:
      logging.info("Wrote %d of %d files.", len(digests), len(files))
    return digests

  def finish(partial: pathlib.Path, found: dict[str, str]) -> None:
    shards.write_index(partial, files, shapes, dtype)
    shards.open_directory(partial)
    digests = {file: found[file] for file in files}
    card.write(
      partial, about, source=source, library="transformers", digests=digests
    )

  opened = _partial_export(
    directory,
    model,
    source=source,
    dtype=dtype,
    overwrite=overwrite,
    chat_template=chat_template,
  )
  process_group.write_directory(share, opened, write_part, finish)


def _reporting(fetch: Fetch, progress: Callable[[int], None]) -> Fetch:
  """Wraps `fetch` to report the bytes of each tensor."""

  def fetch_and_report(name: str) -> np.ndarray:
    array = fetch(name)
    progress(array.nbytes)
    return array

  return fetch_and_report


@contextlib.contextmanager
def _partial_export(
  directory: pathlib.Path,
  model: decoder.Model,
  *,
  source: pathlib.Path,
  dtype: str,
  overwrite: bool,
  chat_template: str,
) -> Iterator[pathlib.Path]:
  """Checks the export; writes all files but the weights and the card.

  Yields:
    The private directory; see `target.writing`.
  """
  fields = check(
    directory, model, source=source, dtype=dtype, overwrite=overwrite
  )
  with target.writing(directory) as partial:
    _write_texts(partial, source, _updated(fields, model, dtype))
    if chat_template:  # It takes precedence over tokenizer_config.json.
      (partial / "chat_template.jinja").write_text(chat_template, "utf-8")
    yield partial


def check(
  directory: pathlib.Path,
  model: decoder.Model,
  *,
  source: pathlib.Path,
  dtype: str,
  overwrite: bool,
) -> dict[str, Any]:  # Any: JSON.
  """Rejects what `write` would reject, as far as is known before writing.

  Returns:
    The fields of the source's config.

  Raises:
    errors.AtlasError: see `write`.
  """
  if dtype not in ("float32", "bfloat16"):
    raise ValueError(f"Got dtype={dtype!r}, expected float32 or bfloat16.")
  target.check(
    directory,
    source,
    num_bytes=num_bytes(model, dtype),
    overwrite=overwrite,
  )
  return _check_source(source, model)


def num_bytes(model: decoder.Model, dtype: str) -> int:
  """Returns the size in bytes of a model's weights."""
  counts = map(math.prod, rules.shapes(model).values())
  return np.dtype(dtype).itemsize * sum(counts)


class Tensors:
  """Parameters as the tensors of their files, by Hugging Face name.

  Values are cast on their devices, so only the written bytes are transferred.
  If several processes hold the parameters, all of them gather one tensor at a
  time.
  """

  def __init__(
    self, params: decoder.Params, model: decoder.Model, dtype: str
  ) -> None:
    self._leaves, self._dtype = dict(rules.flatten(params)), dtype
    self._pieces: dict[str, list[rules.Piece]] = {}
    for piece in rules.pieces(model):
      self._pieces.setdefault(piece.name, []).append(piece)

  def fetch(self, name: str) -> np.ndarray:
    """Returns a tensor on the host; it is often not contiguous."""
    parts = [
      rules.to_hf(piece.rule, np.asarray(self._layer(piece)))
      for piece in self._pieces[name]
    ]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)

  def join_fetch(self, name: str) -> None:
    """Joins the collectives with which another process fetches a tensor."""
    for piece in self._pieces[name]:
      layer = self._layer(piece)
      # Otherwise all transfers would be in flight at once.
      jax.block_until_ready(layer)

  def _layer(self, piece: rules.Piece) -> jax.Array | np.ndarray:
    leaf = self._leaves[piece.rule.path]
    if leaf.dtype == self._dtype and _is_on_host(leaf):
      return np.asarray(leaf)[piece.index]
    place = None
    if not leaf.is_fully_addressable:
      place = js.NamedSharding(leaf.sharding.mesh, js.PartitionSpec())
    return _cut(place)(leaf, piece.index, self._dtype)


def _is_on_host(leaf: jax.Array) -> bool:
  """Returns whether NumPy can view the whole array without a copy."""
  platforms = {device.platform for device in leaf.devices()}
  return leaf.is_fully_replicated and platforms == {"cpu"}


@functools.lru_cache
def _cut(
  place: js.Sharding | None,
) -> Callable[[jax.Array, tuple[int, ...], str], jax.Array]:
  """Returns a jitted function that slices a layer of a parameter and casts it.

  Slice and cast are one program: run separately, the copy of the layer in its
  old precision would take most of the time.

  Args:
    place: sharding of the layer; None leaves it to the compiler.
  """

  @functools.partial(jax.jit, static_argnames="dtype", out_shardings=place)
  def cut(leaf: jax.Array, index: tuple[int, ...], dtype: str) -> jax.Array:
    return leaf[index].astype(dtype)

  return cut


def describe_carried(source: pathlib.Path, chat_template: str = "") -> str:
  """Describes the copied files, and those that the source lacks.

  Args:
    source: see `write`.
    chat_template: see `write`.
  """
  names = carried(source)
  text = f"Copied: {', '.join(names)}."
  if _GENERATION not in names:
    text += f" {_GENERATION} is derived from {source / 'config.json'}."
  settings = source / "tokenizer_config.json"
  fields = shards.read_json(settings) if settings.exists() else {}
  has_file = any(name.startswith("chat_template") for name in names)
  if chat_template:
    text += " The chat template is that of training, not of the base model."
  elif not has_file and "chat_template" not in fields:
    text += " Without a chat template, the export cannot be served for chat."
  return text


def carried(source: pathlib.Path) -> list[str]:
  """Lists the files of a source that are copied unchanged."""
  found = (path for pattern in _CARRIED for path in source.glob(pattern))
  return sorted({path.name for path in found if path.is_file()})


def _check_source(
  source: pathlib.Path, model: decoder.Model
) -> dict[str, Any]:  # Any: JSON.
  """Returns the source's config; rejects another shape or no tokenizer."""
  config, fields = load.read_config(
    source, ignore_fields=model.config.ignored_fields
  )
  if config != model.config:
    raise errors.CheckpointError(
      "The source's config does not match the model.",
      where=str(source / "config.json"),
      why=f"It describes {config}, but the model has {model.config}.",
      fix="Pass the directory that the model was loaded from.",
    )
  if not any((source / name).exists() for name in _TOKENIZER_FILES):
    raise errors.CheckpointError(
      "The source has no tokenizer.",
      where=str(source),
      why=f"An export needs one of {', '.join(_TOKENIZER_FILES)} to be served.",
      fix="Add the tokenizer's files to that directory.",
    )
  _check_vocabulary(source / "tokenizer.json", config.vocab_size)
  return fields


def _check_vocabulary(path: pathlib.Path, vocab_size: int) -> None:
  """Rejects a tokenizer with ids beyond the model's embedding."""
  fields = shards.read_json(path) if path.exists() else {}
  vocabulary = fields.get("model", {}).get("vocab", {})
  added = [token["id"] for token in fields.get("added_tokens", [])]
  by_place = isinstance(vocabulary, list)  # Unigram; others map to ids.
  ids = range(len(vocabulary)) if by_place else vocabulary.values()
  largest = max([*ids, *added], default=-1)
  if largest >= vocab_size:
    raise errors.CheckpointError(
      "The tokenizer does not match the model.",
      where=str(path),
      why=f"Its largest id is {largest}, but the model has {vocab_size} ids.",
      fix="Use the tokenizer that the model was trained with.",
    )


def _updated(
  fields: Mapping[str, Any],  # Any: JSON.
  model: decoder.Model,
  dtype: str,
) -> dict[str, Any]:  # Any: JSON.
  """Returns the source's config with the architecture and dtype written."""
  # transformers 4 reads the older name, and 5 reads both.
  name = "torch_dtype" if "torch_dtype" in fields else "dtype"
  kept = {key: fields[key] for key in fields if key != "dtype"}
  architecture = rules.ARCHITECTURES[model.config.family]
  return {**kept, "architectures": [architecture], name: dtype}


def _write_texts(
  partial: pathlib.Path,
  source: pathlib.Path,
  fields: Mapping[str, Any],  # Any: JSON.
) -> None:
  """Writes all files but the weights and the card."""
  for name in carried(source):
    shutil.copyfile(source / name, partial / name)
  shards.write_json(partial / "config.json", fields)
  generation = partial / _GENERATION
  if not generation.exists():
    ids = {key: fields[key] for key in _TOKEN_IDS if key in fields}
    shards.write_json(
      generation, {key: ids[key] for key in ids if ids[key] is not None}
    )
