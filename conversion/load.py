# SPDX-License-Identifier: Apache-2.0
"""Loads Hugging Face directories as parameters, without torch.

Each device's part of a parameter is read from the memory-mapped files
directly: the host holds the parts of one parameter at a time and reads only
bytes that a device needs.
"""

import collections
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
import concurrent.futures
import dataclasses
import difflib
import functools
import hashlib
import itertools
import os
import pathlib
import re
from typing import Any, NamedTuple, TypeAlias

from absl import logging
import huggingface_hub
import jax
import jax.sharding as js
import numpy as np

from atlas_jax import errors
from atlas_jax.models import decoder, decoder_config, quantized
from conversion import arrays, header, quantize, rules, shards

# An id on the Hub, with an optional revision.
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?(@.+)?")
_HUB_PATTERNS = ("*.json", "tokenizer*", "*.txt", "*.jinja")
_HUB_WEIGHTS = ("*.safetensors",)
_MAX_LISTED = 8
# Twice the cores, since half of the readers may be waiting for the disk.
NUM_READERS = min(16, 2 * (os.cpu_count() or 1))
_STEP_BYTES = 16 * 2**20  # Per read, so that readers finish together.
_NUM_AHEAD = 16  # Steps prefetched before they are read.


def resolve(name: str, *, with_weights: bool = True) -> pathlib.Path:
  """Returns a model's directory; downloads it from the Hub if it is not a path.

  Args:
    name: a local directory, or `owner/name` on the Hugging Face Hub, optionally
      with `@revision`: a branch, a tag or, for a reproducible result, a commit.
    with_weights: whether to download the weights too.

  Raises:
    errors.CheckpointError: if it is neither, is a run's workdir, or the
      download fails.
  """
  if (path := find(name)) is not None:
    return path
  patterns = [*_HUB_PATTERNS, *(_HUB_WEIGHTS if with_weights else ())]
  try:
    # Skips the pickled and original weights that repositories may hold.
    repository, _, revision = name.partition("@")
    found = huggingface_hub.snapshot_download(
      repository, revision=revision or None, allow_patterns=patterns
    )
  except (OSError, ValueError) as error:
    raise errors.CheckpointError(
      "The model was not found on disk or on the Hub.",
      where=name,
      why=f"{type(error).__name__}: {str(error).splitlines()[0]}",
      fix="Check the path. For a Hub model, check its name, the network, and "
      "HF_TOKEN if it is gated; HF_HUB_OFFLINE=1 is offline mode.",
    ) from error
  return pathlib.Path(found)


def find(name: str) -> pathlib.Path | None:
  """Returns a model's directory, or None for an id on the Hub.

  Raises:
    errors.CheckpointError: if it is neither, or is a run's workdir.
  """
  path = pathlib.Path(name).expanduser()
  if path.exists():
    shards.check_is_model(path)
    return path
  # In `results/x`, where `results` is a folder here, no owner is meant.
  is_here = len(path.parts) > 1 and path.parent.is_dir()
  if is_here or not _HUB_ID.fullmatch(name):
    raise _no_folder(name, path)
  return None


def _no_folder(name: str, path: pathlib.Path) -> errors.CheckpointError:
  """Returns an error that suggests a folder of a similar name."""
  parent = path.parent
  while not parent.is_dir():
    parent = parent.parent
  wanted = path.relative_to(parent).parts[0]
  folders = [each.name for each in parent.iterdir() if each.is_dir()]
  near = difflib.get_close_matches(wanted, folders, n=1)
  return errors.CheckpointError(
    "The model folder does not exist.",
    where=name,
    why=f"{parent.absolute()} has no {wanted}, and an id on the Hub would be "
    "owner/name.",
    fix=f"Did you mean {parent / near[0]}?"
    if near
    else "Check the path; a run writes its model to WORKDIR/export.",
  )


def read_config(
  directory: pathlib.Path, *, ignore_fields: Collection[str] = ()
) -> tuple[decoder_config.DecoderConfig, dict[str, Any]]:  # Any: JSON.
  """Reads `config.json` as a `DecoderConfig`, and as raw JSON.

  It logs the fields that transformers does not read either, once per file.

  Args:
    directory: in Hugging Face format.
    ignore_fields: names of fields that are treated as absent.

  Raises:
    errors.CheckpointError: if the file is absent or malformed, or describes an
      unsupported model.
  """
  if directory.is_file():
    raise errors.CheckpointError(
      "Expected a model directory, got a file.",
      where=str(directory),
      why="config.json and the tokenizer are read from the same directory.",
      fix=f"Pass {directory.parent} instead.",
    )
  path = directory / "config.json"
  fields = shards.read_json(path)
  try:
    config = decoder_config.from_hf(fields, ignore_fields=ignore_fields)
  except errors.CheckpointError as error:
    raise errors.CheckpointError(
      error.what, where=str(path), why=error.why, fix=error.fix
    ) from error
  if unread := decoder_config.unread(fields):
    _log_unread(str(path), ", ".join(unread))
  return config, fields


@functools.cache  # So that a file that is read again is logged once.
def _log_unread(path: str, names: str) -> None:
  logging.info("Ignored fields of %s, as transformers does: %s", path, names)


def load(
  directory: pathlib.Path,
  model: decoder.Model,
  *,
  param_dtype: str,
  shardings: Any = None,  # Any: a tree like the parameters'.
  progress: Callable[[int], None] = lambda _: None,
) -> decoder.Params:
  """Loads the parameters of a model.

  Args:
    directory: in Hugging Face format, of the same shape as `model`.
    model: as built from this directory's config.
    param_dtype: "float32" or "bfloat16" for parameters of that precision, or
      one of `quantized.KINDS` for quantized kernels.
    shardings: a tree of `jax.sharding.Sharding` like the parameters', or None
      for the first device.
    progress: called with the number of bytes of each parameter once it is read.

  Returns:
    The parameters, with the structure of `model.init`; a quantized kernel is a
    dict of arrays.

  Raises:
    errors.ConfigError: if `param_dtype` is invalid for the parameters.
    errors.CheckpointError: if a file is malformed, a value is not finite, or
      tensors are missing, unexpected or of the wrong shape (all in one list).
  """
  kept = describe(model, param_dtype)
  tensors = open_tensors(directory, model)
  if shardings is None:
    first = js.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: first, kept)
  waiting = _waiting(model, kept, shardings, tensors)
  leaves = []
  ahead = itertools.chain.from_iterable(
    item.read_ahead() for item in waiting if isinstance(item, _Parameter)
  )
  collections.deque(itertools.islice(ahead, _NUM_AHEAD), maxlen=0)
  with concurrent.futures.ThreadPoolExecutor(NUM_READERS) as pool:
    for item in waiting:
      if isinstance(item, _Parameter):
        # Any: a dict of arrays, or an array.
        leaf: Any = item.assemble(pool, ahead)
      else:
        leaf = quantize.assemble(item.kernel, item.places, tensors, pool)
      leaves.append(leaf)
      progress(sum(array.nbytes for array in jax.tree.leaves(leaf)))
  return jax.tree.unflatten(jax.tree.structure(model.abstract_params), leaves)


class _Kernel(NamedTuple):
  """A kernel to be read and quantized, and the shardings of its arrays."""

  kernel: quantize.Kernel
  places: Mapping[str, js.Sharding]


def _waiting(
  model: decoder.Model,
  kept: dict[str, Any],  # Any: as `describe` returns it.
  shardings: Any,  # Any: a tree like the parameters'.
  tensors: Mapping[str, header.Tensor],
) -> list["_Parameter | _Kernel"]:
  """Returns one reader per parameter, in the order of `jax.tree`."""
  parts: dict[str, dict[tuple[int, ...], rules.Piece]] = {}
  for piece in rules.pieces(model):
    parts.setdefault(piece.rule.path, {})[piece.index] = piece
  structure = jax.tree.structure(model.abstract_params)
  described, places = map(structure.flatten_up_to, (kept, shardings))
  return [
    _Kernel(quantize.Kernel(path, parts[path], leaf), place)
    if isinstance(leaf, Mapping)
    else _Parameter(leaf.shape, leaf.dtype, place, parts[path], tensors)
    for (path, _), leaf, place in zip(
      rules.flatten(model.abstract_params), described, places, strict=True
    )
  ]


def describe(model: decoder.Model, param_dtype: str) -> dict[str, Any]:
  """Returns the shapes and dtypes of the parameters that `load` returns.

  It reads no file.

  Raises:
    errors.ConfigError: if `param_dtype` is invalid for the parameters.
  """
  if param_dtype in quantized.KINDS:
    return quantized.describe(model.abstract_params, param_dtype)
  if param_dtype not in ("float32", "bfloat16"):
    raise errors.ConfigError(
      f"Unsupported param_dtype: {param_dtype}.",
      where=f"param_dtype={param_dtype}",
      why="It must be float32 or bfloat16; int8 and nf4 need adapters.",
      fix="Set one of these.",
    )
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.dtype(param_dtype)),
    model.abstract_params,
  )


_Ranges: TypeAlias = tuple[range, ...]


@dataclasses.dataclass(frozen=True)
class _Parameter:
  """A parameter to be read: its shape, sharding and pieces in the files."""

  shape: tuple[int, ...]
  dtype: np.dtype
  place: js.Sharding
  parts: Mapping[tuple[int, ...], rules.Piece]
  tensors: Mapping[str, header.Tensor]

  def assemble(
    self, pool: concurrent.futures.Executor, ahead: Iterator[None]
  ) -> jax.Array:
    """Returns an array of the parts that this process's devices own.

    After each step, the disk is asked to prefetch one more.
    """
    owned = []
    for ranges, devices in self._owners().items():
      block = arrays.empty([len(each) for each in ranges], self.dtype)
      reads = [
        pool.submit(
          _copy,
          source.name,
          source.values[rows],
          rules.to_hf(source.rule, block[source.place])[rows],
        )
        for source, rows in self._steps(ranges)
      ]
      for read in reads:
        read.result()
        next(ahead, None)
      owned += [jax.device_put(block, device) for device in devices]
    return jax.make_array_from_single_device_arrays(
      self.shape, self.place, owned
    )

  def read_ahead(self) -> Iterator[None]:
    """Prefetches what `assemble` will read, step by step."""
    for ranges in self._owners():
      for source, rows in self._steps(ranges):
        shards.read_ahead(
          self.tensors[source.name], source.tensor, source.values[rows]
        )
        yield

  def _owners(
    self,
  ) -> dict[_Ranges, list[Any]]:  # Any: JAX names no type for devices.
    """Groups this process's devices by the part that they own."""
    owners = collections.defaultdict(list)
    indices = self.place.addressable_devices_indices_map(self.shape)
    for device, index in indices.items():
      ranges = (
        range(*part.indices(size))
        for part, size in zip(index or (), self.shape, strict=True)
      )
      owners[tuple(ranges)].append(device)
    return owners

  def _sources(self, ranges: _Ranges) -> Iterator["_Source"]:
    """Yields the pieces of the files that make up a part."""
    num_stacked = len(next(iter(self.parts)))
    index = tuple(slice(r.start, r.stop) for r in ranges[num_stacked:])
    stacked = ranges[:num_stacked]
    for place in np.ndindex(*map(len, stacked)):
      piece = self.parts[
        tuple(each[i] for each, i in zip(stacked, place, strict=True))
      ]
      tensor = shards.read(self.tensors[piece.name])
      rows = tensor[piece.start : piece.stop]
      ours = rules.from_hf(piece.rule, rows, piece.shape)[index]
      values = rules.to_hf(piece.rule, ours)
      yield _Source(piece.name, piece.rule, place, tensor, values)

  def _steps(self, ranges: _Ranges) -> Iterator[tuple["_Source", slice]]:
    """Divides the reading of a part into row slices of its tensors."""
    for source in self._sources(ranges):
      num_rows, num_bytes = len(source.values), source.values.nbytes
      size = max(1, _STEP_BYTES * num_rows // max(1, num_bytes))
      for start in range(0, num_rows, size):
        yield source, slice(start, start + size)


class _Source(NamedTuple):
  """A piece of a parameter in a file, and its index in the stack of pieces.

  `values` views it as rows of the memory-mapped `tensor` of the file.
  """

  name: str
  rule: rules.Rule
  place: tuple[int, ...]
  tensor: np.ndarray
  values: np.ndarray


def _copy(name: str, source: np.ndarray, target: np.ndarray) -> None:
  """Copies and casts part of a tensor; checks that all values stay finite."""
  check = functools.partial(arrays.check_finite, name)
  arrays.copy(source, target, check)
  if target.itemsize < source.itemsize:  # Large values may overflow.
    check(target)


def open_tensors(
  directory: pathlib.Path, model: decoder.Model
) -> dict[str, header.Tensor]:
  """Finds the tensors of a model; reads only headers.

  Raises:
    errors.CheckpointError: if a file is malformed, or tensors are missing,
      unexpected or of the wrong shape; all in one list.
  """
  tensors = shards.open_directory(directory)
  expected = rules.shapes(model)
  missing = [name for name in expected if name not in tensors]
  unexpected = [
    name
    for name in tensors
    if name not in expected and not rules.IGNORED.fullmatch(name)
  ]
  if model.config.tie_embeddings and rules.HEAD_NAME in unexpected:
    unexpected.remove(rules.HEAD_NAME)
    _check_tied(directory, tensors)
  misshapen = [
    f"{name} is {tensors[name].shape}, not {shape}"
    for name, shape in expected.items()
    if name in tensors and tensors[name].shape != shape
  ]
  if missing or unexpected or misshapen:
    raise errors.CheckpointError(
      "The weights do not match config.json.",
      where=str(directory),
      why=f"Missing: {_listed(missing)}. Unexpected: {_listed(unexpected)}. "
      f"Wrong shape: {_listed(misshapen)}.",
      fix="Download the model again; config.json and the weights must be of "
      "the same model.",
    )
  return tensors


def _check_tied(
  directory: pathlib.Path, tensors: Mapping[str, header.Tensor]
) -> None:
  """Rejects a head that differs from the embedding it is tied to."""
  head, embedding = (
    tensors.get(name) for name in (rules.HEAD_NAME, rules.EMBEDDING_NAME)
  )
  if head and embedding:
    same = shards.digest(shards.read(head)) == shards.digest(
      shards.read(embedding)
    )
    if not same or (head.dtype, head.shape) != (
      embedding.dtype,
      embedding.shape,
    ):
      raise errors.CheckpointError(
        "A tied head differs from the embedding.",
        where=f"{directory}: {rules.HEAD_NAME}",
        why="config.json has tie_word_embeddings=true, but the weights hold a "
        "different head.",
        fix="Set tie_word_embeddings to false if the head was trained.",
      )


def _listed(names: Sequence[str]) -> str:
  if not names:
    return "none"
  more = len(names) - _MAX_LISTED
  text = ", ".join(names[:_MAX_LISTED])
  return f"{text} and {more} more" if more > 0 else text


def fingerprint(directory: pathlib.Path) -> str:
  """Returns a SHA-256 digest of a model directory's weight files."""
  digest = hashlib.sha256()
  for path in sorted(directory.glob("*.safetensors")):
    with path.open("rb") as file:
      digest.update(hashlib.file_digest(file, "sha256").digest())
  return digest.hexdigest()
