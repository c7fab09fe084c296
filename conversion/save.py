# SPDX-License-Identifier: Apache-2.0
"""Parameters become a Hugging Face directory which transformers opens.

Everything is written aside, read back and compared before it gets its name.
"""

from collections.abc import Callable, Mapping
import contextlib
import functools
import json
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

# Gives a tensor by its Hugging Face name.
Fetch = Callable[[str], np.ndarray]

_GENERATION = "generation_config.json"
# What goes along with the weights, unchanged.
_CARRIED = (
  *("tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json"),
  *("added_tokens.json", "chat_template*", _GENERATION),
  *("LICENSE*", "NOTICE*"),
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def save(  # noqa: PLR0913 - what is written, where, and how it looks.
  directory: pathlib.Path,
  params: decoder.Params,
  model: decoder.Model,
  *,
  source: pathlib.Path,
  dtype: Literal["float32", "bfloat16"],
  max_shard_bytes: int,
  about: card.Card,
  overwrite: bool,
  progress: Callable[[int], None] = lambda _: None,
  share: process_group.ProcessShare = process_group.ALONE,
) -> None:
  """Writes the parameters of `model`, on the devices of all that share it.

  All else is as in `write`.
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
    progress=progress,
    share=share,
    elsewhere=tensors.take_part,
  )


def write(  # noqa: PLR0913 - what is written, where, and how it looks.
  directory: pathlib.Path,
  fetch: Fetch,
  model: decoder.Model,
  *,
  source: pathlib.Path,
  dtype: Literal["float32", "bfloat16"],
  max_shard_bytes: int,
  about: card.Card,
  overwrite: bool,
  progress: Callable[[int], None] = lambda _: None,
  share: process_group.ProcessShare = process_group.ALONE,
  elsewhere: Callable[[str], object] = lambda _: None,
) -> None:
  """Writes a model directory, whole or not at all.

  Args:
    directory: the target.
    fetch: gives every tensor that the model's files have.
    model: what they are tensors of.
    source: the directory in Hugging Face format that the model came from; its
      config, tokenizer and generation settings are carried over.
    dtype: of the tensors written.
    max_shard_bytes: see `shards.layout`.
    about: goes into the model card.
    overwrite: replaces what is at `directory`, once the new one is complete.
    progress: told the bytes of each tensor before it is written.
    share: which of several processes this is; all call this, and see the disk.
    elsewhere: see `shards.write_files`.

  Raises:
    errors.ConfigError: if the target is in use.
    errors.CheckpointError: if `source` is incomplete or of another shape, a
      weight is not finite, the disk is full, or the files read back differ; in
      all processes if in one.
  """
  shapes = rules.shapes(model)
  files = shards.layout(shapes, dtype=dtype, max_shard_bytes=max_shard_bytes)
  is_first = share.index == 0
  held = contextlib.ExitStack()

  def begin() -> str:
    if not is_first:
      return ""
    fields = check(
      directory, model, source=source, dtype=dtype, overwrite=overwrite
    )
    partial = held.enter_context(target.writing(directory))
    _write_texts(partial, source, _updated(fields, model, dtype))
    return str(partial)

  def fetch_and_tell(name: str) -> np.ndarray:
    array = fetch(name)
    progress(array.nbytes)
    return array

  def write_part() -> str:
    with target.disk_errors(directory):
      digests = shards.write_files(
        partial,
        files,
        shapes,
        fetch_and_tell,
        dtype=dtype,
        share=share,
        elsewhere=elsewhere,
      )
    if share.count > 1:
      logging.info("Wrote %d of %d files.", len(digests), len(files))
    return json.dumps(digests)

  def end() -> str:
    if is_first:
      shards.write_index(partial, files, shapes, dtype)
      shards.open_directory(partial)
      card.write(
        partial, about, source=source, library="transformers", digests=digests
      )
    held.close()  # Gives it its name.
    return ""

  with held:
    partial = pathlib.Path(share.together(begin)[0])
    parts = map(json.loads, share.together(write_part))
    found = {file: digest for part in parts for file, digest in part.items()}
    digests = {file: found[file] for file in files}
    share.together(end)


def check(
  directory: pathlib.Path,
  model: decoder.Model,
  *,
  source: pathlib.Path,
  dtype: str,
  overwrite: bool,
) -> dict[str, Any]:  # Any: JSON.
  """Refuses what `write` would, as far as it is known before writing.

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
  """Tells how much the weights of a model take."""
  counts = map(math.prod, rules.shapes(model).values())
  return np.dtype(dtype).itemsize * sum(counts)


class Tensors:
  """Parameters as the tensors of their files, by Hugging Face name.

  Values are cast where they lie, so that no more bytes travel than are
  written. Where several processes hold the parameters, one tensor after the
  other is brought to all of them.
  """

  def __init__(
    self, params: decoder.Params, model: decoder.Model, dtype: str
  ) -> None:
    self._leaves, self._dtype = dict(rules.flatten(params)), dtype
    self._pieces: dict[str, list[rules.Piece]] = {}
    for piece in rules.pieces(model):
      self._pieces.setdefault(piece.name, []).append(piece)

  def fetch(self, name: str) -> np.ndarray:
    """Fetches a tensor from its devices; it is often not contiguous."""
    parts = [
      rules.to_hf(piece.rule, np.asarray(self._layer(piece)))
      for piece in self._pieces[name]
    ]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)

  def take_part(self, name: str) -> None:
    """Does what another process needs to fetch a tensor."""
    for piece in self._pieces[name]:
      layer = self._layer(piece)
      # Else all of them would be on their way at once.
      jax.block_until_ready(layer)

  def _layer(self, piece: rules.Piece) -> jax.Array | np.ndarray:
    leaf = self._leaves[piece.rule.path]
    if leaf.dtype == self._dtype and _is_in_reach(leaf):
      return np.asarray(leaf)[piece.index]
    place = None
    if not leaf.is_fully_addressable:
      place = js.NamedSharding(leaf.sharding.mesh, js.PartitionSpec())
    return _cut(place)(leaf, piece.index, self._dtype)


def _is_in_reach(leaf: jax.Array) -> bool:
  """Tells whether NumPy sees a whole array without a copy."""
  platforms = {device.platform for device in leaf.devices()}
  return leaf.is_fully_replicated and platforms == {"cpu"}


@functools.lru_cache
def _cut(
  place: js.Sharding | None,
) -> Callable[[jax.Array, tuple[int, ...], str], jax.Array]:
  """Makes the function that cuts a layer out of a parameter, and casts it.

  It is one program: step by step, a copy of the layer in its old precision
  would be made first, and most of the time would go into that.

  Args:
    place: where the layer goes; None leaves it to the compiler.
  """

  @functools.partial(jax.jit, static_argnames="dtype", out_shardings=place)
  def cut(leaf: jax.Array, index: tuple[int, ...], dtype: str) -> jax.Array:
    return leaf[index].astype(dtype)

  return cut


def describe_carried(source: pathlib.Path) -> str:
  """Tells what goes along with the weights, and what a source does not have."""
  names = carried(source)
  told = f"Carried over: {', '.join(names)}."
  if _GENERATION not in names:
    told += f" {_GENERATION} is made of {source / 'config.json'}."
  settings = source / "tokenizer_config.json"
  fields = shards.read_json(settings) if settings.exists() else {}
  has_file = any(name.startswith("chat_template") for name in names)
  if not has_file and "chat_template" not in fields:
    told += " There is no chat template, so a server of it cannot chat."
  return told


def carried(source: pathlib.Path) -> list[str]:
  """Names the files of a source that go along with the weights, unchanged."""
  found = (path for pattern in _CARRIED for path in source.glob(pattern))
  return sorted({path.name for path in found if path.is_file()})


def _check_source(
  source: pathlib.Path, model: decoder.Model
) -> dict[str, Any]:  # Any: JSON.
  """Reads the source's config; refuses another shape, or no tokenizer."""
  config, fields = load.read_config(source)
  if config != model.config:
    raise errors.CheckpointError(
      "The export would carry the config of another model.",
      where=str(source / "config.json"),
      why=f"It describes {config}, the parameters are of {model.config}.",
      fix="Give the directory that the model was loaded from.",
    )
  if not any((source / name).exists() for name in _TOKENIZER_FILES):
    raise errors.CheckpointError(
      "The model has no tokenizer to carry over.",
      where=str(source),
      why=f"None of {', '.join(_TOKENIZER_FILES)} is there, and an export "
      "without one cannot be served.",
      fix="Put the tokenizer's files beside config.json.",
    )
  _check_vocabulary(source / "tokenizer.json", config.vocab_size)
  return fields


def _check_vocabulary(path: pathlib.Path, vocab_size: int) -> None:
  """Refuses a tokenizer with ids that the model has no embedding for."""
  fields = shards.read_json(path) if path.exists() else {}
  vocabulary = fields.get("model", {}).get("vocab", {})
  added = [token["id"] for token in fields.get("added_tokens", [])]
  by_place = isinstance(vocabulary, list)  # Unigram's; others name each id.
  ids = range(len(vocabulary)) if by_place else vocabulary.values()
  largest = max([*ids, *added], default=-1)
  if largest >= vocab_size:
    raise errors.CheckpointError(
      "The tokenizer is of another model.",
      where=str(path),
      why=f"Its ids go up to {largest}, and the model has {vocab_size}.",
      fix="Put the tokenizer that the model was trained with beside it.",
    )


def _updated(
  fields: Mapping[str, Any],  # Any: JSON.
  model: decoder.Model,
  dtype: str,
) -> dict[str, Any]:  # Any: JSON.
  """Gives the source's config with what the export changes."""
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
  """Writes what goes along with weights and card."""
  for name in carried(source):
    shutil.copyfile(source / name, partial / name)
  shards.write_json(partial / "config.json", fields)
  generation = partial / _GENERATION
  if not generation.exists():
    ids = {key: fields[key] for key in _TOKEN_IDS if key in fields}
    shards.write_json(
      generation, {key: ids[key] for key in ids if ids[key] is not None}
    )
