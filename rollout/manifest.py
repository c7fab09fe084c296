# SPDX-License-Identifier: Apache-2.0
"""What a directory of pushed weights holds, written last and checked first.

  <root>/<version>/config.json, *.safetensors (and their index), manifest.json

The manifest names every other file with its size and digest, and every tensor
with its shape. It is written when all else is on disk, so a directory without
one is unfinished; its own digest travels with the request, so both sides mean
the same bytes. Needs neither jax nor torch: trainer and server both use it.
"""

from collections.abc import Collection, Mapping
import concurrent.futures
import hashlib
import itertools
import json
import os
import pathlib
import re
import stat
from typing import Annotated, Literal

import numpy as np
import pydantic

from atlas_jax import errors
from conversion import arrays, header, shards

NAME = "manifest.json"

_MAX_BYTES = 64 * 2**20
_CHUNK_BYTES = 2**20  # Stays in the cache while it is hashed and checked.
# Left out of pushes, as of exports: computed, and equal to another when tied.
_COMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_HEAD = "lm_head.weight"
_DTYPES = {"F32": "float32", "BF16": "bfloat16"}


class _Record(pydantic.BaseModel):
  model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class File(_Record):
  """One file by its size and digest, as `shards.new_digest` makes it.

  That nobody else writes the files is up to their directory, which is private.
  """

  size: Annotated[int, pydantic.Field(ge=0)]
  digest: str


class Tensor(_Record):
  """One weight, without its values."""

  shape: tuple[int, ...]
  dtype: Literal["F32", "BF16"]


class Manifest(_Record):
  """All files of a directory but this one, and all tensors in them."""

  version: Annotated[int, pydantic.Field(ge=0)]
  files: dict[str, File]
  tensors: dict[str, Tensor]


def directory_of(root: pathlib.Path, version: int) -> pathlib.Path:
  """Gives the directory of a version: a name of digits, so never outside."""
  return root / str(int(version))


def describe(path: pathlib.Path) -> File:
  """Reads a file once, for its size and digest."""
  return _scan(path, ())[0]


def write(directory: pathlib.Path, manifest: Manifest) -> str:
  """Writes the manifest and waits until it is on disk; everything else is.

  Returns:
    Its digest, for `wire.UpdateRequest`.
  """
  raw = manifest.model_dump_json(indent=1).encode()
  with (directory / NAME).open("xb") as file:
    file.write(raw)
    file.flush()
    os.fsync(file.fileno())
  return hashlib.sha256(raw).hexdigest()


def read(directory: pathlib.Path) -> tuple[Manifest, str]:
  """Reads the manifest of a directory, with its digest.

  Raises:
    errors.CheckpointError: if there is none, or it is malformed.
  """
  path = directory / NAME
  try:
    if not stat.S_ISREG(path.lstat().st_mode):
      raise _refuse(path, "it is not a plain file")
    if path.stat().st_size > _MAX_BYTES:
      raise _refuse(path, f"it is larger than {_MAX_BYTES} bytes")
    raw = path.read_bytes()
    return Manifest.model_validate_json(raw), hashlib.sha256(raw).hexdigest()
  except (OSError, ValueError) as error:
    reason = str(error).splitlines()[0]
    raise _refuse(path, f"it cannot be read ({reason})") from error


def verify(
  root: pathlib.Path,
  *,
  version: int,
  digest: str,
  shapes: Mapping[str, tuple[int, ...]],
) -> pathlib.Path:
  """Checks every byte of a pushed version.

  Args:
    root: the directory that versions are pushed to.
    version: the version meant.
    digest: of its manifest, as the trainer wrote it.
    shapes: the tensors it must hold, by Hugging Face name.

  Returns:
    Its directory.

  Raises:
    errors.CheckpointError: if it is absent, unfinished, altered or another
      one; if a link leads out of it; if tensors are not `shapes`; if a value
      is not finite.
  """
  directory = directory_of(root, version)
  if directory.is_symlink() or not directory.is_dir():
    raise _refuse(directory, "it does not exist, or is a link")
  manifest, actual = read(directory)
  if actual != digest:
    raise _refuse(
      directory / NAME, f"its digest is {actual[:12]}, not {digest[:12]}"
    )
  if manifest.version != version:
    raise _refuse(directory / NAME, f"it says version {manifest.version}")
  check_shapes(
    {name: tensor.shape for name, tensor in manifest.tensors.items()},
    shapes,
    where=str(directory),
  )
  _check_files(directory, manifest)
  suspects = _check_bytes(directory, manifest)
  tensors = _check_tensors(directory, manifest)
  for name, tensor in tensors.items():
    if tensor.file.name in suspects:
      arrays.check_finite(name, shards.read(tensor))
  return directory


def check_shapes(
  given: Mapping[str, tuple[int, ...]],
  expected: Mapping[str, tuple[int, ...]],
  *,
  where: str,
) -> None:
  """Refuses missing, unexpected and misshapen tensors, all in one table.

  Raises:
    errors.CheckpointError: with a line for each of them, at most twelve.
  """
  rows = [
    f"{name}: got {_shown(given, name)}, expected {_shown(expected, name)}"
    for name in sorted(given.keys() | expected.keys())
    if given.get(name) != expected.get(name)
  ]
  if rows:
    more = [f"and {len(rows) - 12} more"] * (len(rows) > 12)
    raise errors.CheckpointError(
      "The weights are not those of the model that is served.",
      where=where,
      why="; ".join([*rows[:12], *more]),
      fix="Start the server on the model that is trained.",
    )


def shapes_of(directory: pathlib.Path) -> dict[str, tuple[int, ...]]:
  """Lists the tensors that a push to a model of this directory must hold.

  Raises:
    errors.CheckpointError: if the directory holds no readable model.
  """
  tied = shards.read_json(directory / "config.json").get("tie_word_embeddings")
  return {
    name: tensor.shape
    for name, tensor in shards.open_directory(directory).items()
    if not _COMPUTED.fullmatch(name) and not (tied and name == _HEAD)
  }


def tokenizer_digest(directory: pathlib.Path) -> str:
  """Names what turns text into token ids, and messages into text.

  It covers vocabulary, merges, added tokens and chat template, and does not
  depend on how the files are laid out. Both sides compute it from the model's
  directory.

  Raises:
    errors.CheckpointError: if the directory holds no tokenizer.
  """
  parts: dict[str, object] = {}
  path = directory / "tokenizer.json"
  if path.exists():
    # Padding is set by whoever padded last, not by who made the tokenizer.
    parts["tokenizer"] = {
      name: value
      for name, value in shards.read_json(path).items()
      if name not in ("padding", "truncation")
    }
  for name in ("vocab.json", "merges.txt", "tokenizer.model"):
    if not path.exists() and (directory / name).exists():
      parts[name] = describe(directory / name).digest
  if not parts:
    raise _refuse(directory, "it holds no tokenizer")
  template = directory / "chat_template.jinja"
  config = directory / "tokenizer_config.json"
  if template.exists():
    parts["template"] = template.read_text(encoding="utf-8")
  elif config.exists():
    parts["template"] = shards.read_json(config).get("chat_template")
  raw = json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()
  return hashlib.sha256(raw).hexdigest()


def _check_files(directory: pathlib.Path, manifest: Manifest) -> None:
  """Refuses files left out, left over, of another size, and links."""
  found = {path.name: path.lstat() for path in directory.iterdir()}
  expected = manifest.files.keys() | {NAME}
  if found.keys() != expected:
    wrong = sorted(found.keys() ^ expected)[:8]
    raise _refuse(directory, f"the manifest disagrees about {wrong}")
  for name, file in manifest.files.items():
    if not stat.S_ISREG(found[name].st_mode):
      raise _refuse(directory / name, "it is not a plain file")
    if found[name].st_size != file.size:
      raise _refuse(
        directory / name,
        f"it has {found[name].st_size} bytes, not {file.size}",
      )


def _check_bytes(directory: pathlib.Path, manifest: Manifest) -> set[str]:
  """Reads all files, several at once, and refuses altered ones.

  Returns:
    The files that may hold an infinity or a NaN.
  """
  kinds = {tensor.dtype for tensor in manifest.tensors.values()}

  def is_suspect(name: str) -> bool:
    found, suspect = _scan(directory / name, kinds)
    if found != manifest.files[name]:
      raise _refuse(
        directory / name, "its bytes are not those that were written"
      )
    return suspect

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    suspects = pool.map(is_suspect, manifest.files)
    return set(itertools.compress(manifest.files, suspects))


def _scan(path: pathlib.Path, kinds: Collection[str]) -> tuple[File, bool]:
  """Reads a file once, for its size, its digest, and values not finite.

  The whole file is taken for values of these kinds, which tensors are aligned
  to. What is no tensor may raise a false alarm.
  """
  digest, size, suspect = shards.new_digest(), 0, False
  buffer = np.empty(_CHUNK_BYTES, np.uint8)
  with path.open("rb", buffering=0) as file:
    while length := file.readinto(buffer.data):
      digest.update(buffer[:length].data)
      size += length
      for kind in kinds:
        dtype = np.dtype(_DTYPES[kind])
        whole = length // dtype.itemsize * dtype.itemsize
        suspect |= not arrays.is_finite(buffer[:whole].view(dtype))
  return File(size=size, digest=digest.hexdigest()), suspect


def _check_tensors(
  directory: pathlib.Path, manifest: Manifest
) -> dict[str, header.Tensor]:
  """Holds the files' headers to the manifest."""
  tensors = shards.open_directory(directory)
  written = {
    name: (tensor.shape, str(tensor.dtype)) for name, tensor in tensors.items()
  }
  listed = {
    name: (tensor.shape, _DTYPES[tensor.dtype])
    for name, tensor in manifest.tensors.items()
  }
  if written != listed:
    wrong = sorted(
      name
      for name in written.keys() | listed.keys()
      if written.get(name) != listed.get(name)
    )
    raise _refuse(directory, f"the manifest disagrees about {wrong[:8]}")
  return tensors


def _shown(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
  return str(list(shapes[name])) if name in shapes else "none"


def _refuse(path: pathlib.Path, why: str) -> errors.CheckpointError:
  return errors.CheckpointError(
    "Pushed weights cannot be used.",
    where=str(path),
    why=f"{why}.",
    fix="Push them again as a new version.",
  )
