# SPDX-License-Identifier: Apache-2.0
"""Hugging Face directories become parameters, without torch.

Each device's part of a parameter is cut out of the mapped files by itself, so
the host holds the parts of one parameter at a time and reads no byte that no
device asked for.
"""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
import concurrent.futures
import dataclasses
import functools
import itertools
import os
import pathlib
from typing import Any, NamedTuple, TypeAlias

import huggingface_hub
import jax
import jax.sharding as js
import numpy as np

from atlas_jax import errors
from atlas_jax.models import decoder, decoder_config, quantized
from conversion import arrays, header, quantize, rules, shards

_HUB_PATTERNS = ("*.json", "tokenizer*", "*.txt", "*.jinja")
_HUB_WEIGHTS = ("*.safetensors",)
_MAX_LISTED = 8
# Twice the cores: half of them may wait for the disk.
NUM_READERS = min(16, 2 * (os.cpu_count() or 1))
_STEP_BYTES = 16 * 2**20  # Of a tensor, for one reader: none waits for long.
_NUM_AHEAD = 16  # Steps that the disk fetches before they are read.


def resolve(name: str, *, with_weights: bool = True) -> pathlib.Path:
  """Finds a model directory, fetching it from the hub if it is not a path.

  Args:
    name: a local directory, or `owner/name` on the Hugging Face hub, perhaps
      with `@revision`: a branch, a tag or, to have the same ever after, a
      commit.
    with_weights: whether to fetch these too.

  Raises:
    errors.CheckpointError: if it is neither, or cannot be fetched.
  """
  path = pathlib.Path(name).expanduser()
  if path.exists():
    return path
  patterns = [*_HUB_PATTERNS, *(_HUB_WEIGHTS if with_weights else ())]
  try:
    # Repositories also hold pickled and original weights; those stay there.
    repository, _, revision = name.partition("@")
    found = huggingface_hub.snapshot_download(
      repository, revision=revision or None, allow_patterns=patterns
    )
  except (OSError, ValueError) as error:
    raise errors.CheckpointError(
      "The model can be found neither on disk nor on the hub.",
      where=name,
      why=f"{type(error).__name__}: {str(error).splitlines()[0]}",
      fix="Check the path; for a hub model check its name, the network, "
      "and HF_TOKEN if it is gated; HF_HUB_OFFLINE=1 is offline mode.",
    ) from error
  return pathlib.Path(found)


def read_config(
  directory: pathlib.Path,
) -> tuple[decoder_config.DecoderConfig, dict[str, Any]]:  # Any: JSON.
  """Reads `config.json` as a decoder's shape, and as it is.

  Raises:
    errors.CheckpointError: if the file is absent or malformed, or describes a
      model this project does not compute.
  """
  if directory.is_file():
    raise errors.CheckpointError(
      "A model is a directory, but this is a file.",
      where=str(directory),
      why="config.json and the tokenizer are looked for beside the weights.",
      fix=f"Give {directory.parent} instead.",
    )
  path = directory / "config.json"
  fields = shards.read_json(path)
  try:
    return decoder_config.from_hf(fields), fields
  except errors.CheckpointError as error:
    raise errors.CheckpointError(
      error.what, where=str(path), why=error.why, fix=error.fix
    ) from error


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
    param_dtype: of the parameters, "float32" or "bfloat16"; or how to keep
      kernels, one of `quantized.KINDS`.
    shardings: where each goes: a tree of `jax.sharding.Sharding` like the
      parameters', or None for the first device.
    progress: told the bytes of each parameter once it is read.

  Returns:
    The parameters, as `model.init` would make them, or with a dict in the
    place of each kernel that is kept in few bits.

  Raises:
    errors.ConfigError: if parameters cannot have that dtype.
    errors.CheckpointError: if a file is malformed, tensors are missing,
      unexpected or of another shape (all in one list), or not finite.
  """
  kept = describe(model, param_dtype)
  tensors = open_tensors(directory, model)
  parts: dict[str, dict[tuple[int, ...], rules.Piece]] = {}
  for piece in rules.pieces(model):
    parts.setdefault(piece.rule.path, {})[piece.index] = piece
  structure = jax.tree.structure(model.abstract_params)
  if shardings is None:
    first = js.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: first, kept)
  described, places = map(structure.flatten_up_to, (kept, shardings))
  waiting: list[_Parameter | _Kernel] = [
    _Kernel(quantize.Kernel(path, parts[path], leaf), place)
    if isinstance(leaf, Mapping)
    else _Parameter(leaf.shape, leaf.dtype, place, parts[path], tensors)
    for (path, _), leaf, place in zip(
      rules.flatten(model.abstract_params), described, places, strict=True
    )
  ]
  leaves = []
  ahead = itertools.chain.from_iterable(
    item.read_ahead() for item in waiting if isinstance(item, _Parameter)
  )
  collections.deque(itertools.islice(ahead, _NUM_AHEAD), maxlen=0)
  with concurrent.futures.ThreadPoolExecutor(NUM_READERS) as pool:
    for item in waiting:
      if isinstance(item, _Parameter):
        # Any: a dict of arrays, or an array.
        made: Any = item.assemble(pool, ahead)
      else:
        made = quantize.assemble(item.kernel, item.places, tensors, pool)
      leaves.append(made)
      progress(sum(array.nbytes for array in jax.tree.leaves(made)))
  return jax.tree.unflatten(structure, leaves)


class _Kernel(NamedTuple):
  """A kernel that is to be read and rounded, and where it goes."""

  kernel: quantize.Kernel
  places: Mapping[str, js.Sharding]


def describe(model: decoder.Model, param_dtype: str) -> dict[str, Any]:
  """Tells shapes and precisions of what `load` makes, without a file.

  Raises:
    errors.ConfigError: if parameters cannot be kept so.
  """
  if param_dtype in quantized.KINDS:
    return quantized.describe(model.abstract_params, param_dtype)
  if param_dtype not in ("float32", "bfloat16"):
    raise errors.ConfigError(
      f"Parameters are not kept as {param_dtype}.",
      where=f"param_dtype={param_dtype}",
      why="They are float32 or bfloat16, the base of adapters int8 or nf4 too.",
      fix="Set one of these.",
    )
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, np.dtype(param_dtype)),
    model.abstract_params,
  )


_Ranges: TypeAlias = tuple[range, ...]


@dataclasses.dataclass(frozen=True)
class _Parameter:
  """A parameter that is to be read: what it is, where it goes and lies."""

  shape: tuple[int, ...]
  dtype: np.dtype
  place: js.Sharding
  parts: Mapping[tuple[int, ...], rules.Piece]
  tensors: Mapping[str, header.Tensor]

  def assemble(
    self, pool: concurrent.futures.Executor, ahead: Iterator[None]
  ) -> jax.Array:
    """Makes an array of the parts that this process's devices own.

    For each step that is done, the disk is asked for one more.
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
    """Has the disk fetch what `assemble` will read, step by step."""
    for ranges in self._owners():
      for source, rows in self._steps(ranges):
        shards.read_ahead(
          self.tensors[source.name], source.tensor, source.values[rows]
        )
        yield

  def _owners(
    self,
  ) -> dict[_Ranges, list[Any]]:  # Any: JAX names no type for devices.
    """Lists this process's devices, by the part that they own."""
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
    """Finds the tensors of a part in the files."""
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
    """Divides what is read of a part into some rows of a tensor at a time."""
    for source in self._sources(ranges):
      num_rows, num_bytes = len(source.values), source.values.nbytes
      size = max(1, _STEP_BYTES * num_rows // max(1, num_bytes))
      for start in range(0, num_rows, size):
        yield source, slice(start, start + size)


class _Source(NamedTuple):
  """Where a part of a parameter comes from, and its place in a stack of them.

  `values` shows it as rows of a file: of `tensor`, which is mapped.
  """

  name: str
  rule: rules.Rule
  place: tuple[int, ...]
  tensor: np.ndarray
  values: np.ndarray


def _copy(name: str, source: np.ndarray, target: np.ndarray) -> None:
  """Copies part of a tensor that is finite, before and after."""
  check = functools.partial(arrays.check_finite, name)
  arrays.copy(source, target, check)
  if target.itemsize < source.itemsize:  # Numbers that were large overflow.
    check(target)


def open_tensors(
  directory: pathlib.Path, model: decoder.Model
) -> dict[str, header.Tensor]:
  """Finds the tensors of a model; reads headers only.

  Raises:
    errors.CheckpointError: if a file is malformed, or tensors are missing,
      unexpected or of another shape; all in one list.
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
      "The weights are not those config.json describes.",
      where=str(directory),
      why=f"Missing: {_listed(missing)}. Unexpected: {_listed(unexpected)}. "
      f"Misshapen: {_listed(misshapen)}.",
      fix="Fetch the model again; config.json and weights must belong "
      "together.",
    )
  return tensors


def _check_tied(
  directory: pathlib.Path, tensors: Mapping[str, header.Tensor]
) -> None:
  """Refuses a head that differs from the embedding it is tied to."""
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
        why="config.json has tie_word_embeddings=true, yet the file holds a "
        "head of its own.",
        fix="Set tie_word_embeddings to false if the head was trained.",
      )


def _listed(names: Sequence[str]) -> str:
  if not names:
    return "none"
  more = len(names) - _MAX_LISTED
  text = ", ".join(names[:_MAX_LISTED])
  return f"{text} and {more} more" if more > 0 else text
