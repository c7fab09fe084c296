# SPDX-License-Identifier: Apache-2.0
"""Manifest of a directory of pushed weights; written last and checked first.

  <root>/<version>/config.json, *.safetensors (and their index), manifest.json

The manifest lists every other file with its size and digest, and every tensor
with its shape. A directory without a manifest is incomplete. The digest of the
manifest is part of the update request, so trainer and server mean the same
bytes. The module needs neither jax nor torch, since both sides import it.
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
_CHUNK_BYTES = 2**20  # Fits the CPU cache for hashing and checking.
# Omitted from pushes and exports: computed from the config, or a tied head.
_COMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_HEAD = "lm_head.weight"
_DTYPES = {"F32": "float32", "BF16": "bfloat16"}


class _Record(pydantic.BaseModel):
  model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class File(_Record):
  """Size and digest of one file; see `shards.new_digest`.

  The digest is not cryptographic: the directory's permissions have to keep
  other users from writing the files.
  """

  size: Annotated[int, pydantic.Field(ge=0)]
  digest: str


class Tensor(_Record):
  """Shape and dtype of one weight."""

  shape: tuple[int, ...]
  dtype: Literal["F32", "BF16"]


class Manifest(_Record):
  """All files of a directory but the manifest, and all tensors in them."""

  version: Annotated[int, pydantic.Field(ge=0)]
  files: dict[str, File]
  tensors: dict[str, Tensor]


def directory_of(root: pathlib.Path, version: int) -> pathlib.Path:
  """Returns the directory of a version: digits only, so it is inside `root`."""
  return root / str(int(version))


def describe(path: pathlib.Path) -> File:
  """Reads a file once and returns its size and digest."""
  return _scan(path, ())[0]


def write(directory: pathlib.Path, manifest: Manifest) -> str:
  """Writes the manifest and waits until it is on disk.

  All other files must be on disk already.

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
    errors.CheckpointError: if it is missing or malformed.
  """
  path = directory / NAME
  try:
    if not stat.S_ISREG(path.lstat().st_mode):
      raise _invalid(path, "it is not a regular file")
    if path.stat().st_size > _MAX_BYTES:
      raise _invalid(path, f"it is larger than {_MAX_BYTES} bytes")
    raw = path.read_bytes()
    return Manifest.model_validate_json(raw), hashlib.sha256(raw).hexdigest()
  except (OSError, ValueError) as error:
    reason = str(error).splitlines()[0]
    raise _invalid(path, f"it cannot be read ({reason})") from error


def verify(
  root: pathlib.Path,
  *,
  version: int,
  digest: str,
  shapes: Mapping[str, tuple[int, ...]],
) -> pathlib.Path:
  """Verifies every byte of a pushed version.

  Args:
    root: the directory that versions are pushed to.
    version: the expected version.
    digest: of its manifest, as the trainer wrote it.
    shapes: of the tensors it must hold, by Hugging Face name.

  Returns:
    The directory of the version.

  Raises:
    errors.CheckpointError: if it is missing, incomplete, altered or another
      version; if it contains links; if its tensors differ from `shapes`; if a
      value is not finite.
  """
  directory = directory_of(root, version)
  if directory.is_symlink() or not directory.is_dir():
    raise _invalid(directory, "it does not exist, or is a link")
  manifest, actual = read(directory)
  if actual != digest:
    raise _invalid(
      directory / NAME, f"its digest is {actual[:12]}, not {digest[:12]}"
    )
  if manifest.version != version:
    raise _invalid(
      directory / NAME, f"its version is {manifest.version}, not {version}"
    )
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
  """Rejects missing, unexpected and wrongly shaped tensors, in one table.

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
      "The weights do not match the served model.",
      where=where,
      why="; ".join([*rows[:12], *more]),
      fix="Start the server with the model that is trained.",
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
  """Returns a digest of the tokenizer and its chat template.

  It covers vocabulary, merges, added tokens and chat template, and does not
  depend on the formatting of the files. Trainer and server each compute it from
  the model's directory.

  Raises:
    errors.CheckpointError: if the directory holds no tokenizer.
  """
  parts: dict[str, object] = {}
  path = directory / "tokenizer.json"
  if path.exists():
    # Padding and truncation are run-time settings, saved by chance.
    parts["tokenizer"] = {
      name: value
      for name, value in shards.read_json(path).items()
      if name not in ("padding", "truncation")
    }
  for name in ("vocab.json", "merges.txt", "tokenizer.model"):
    if not path.exists() and (directory / name).exists():
      parts[name] = describe(directory / name).digest
  if not parts:
    raise _invalid(directory, "it has no tokenizer")
  template = directory / "chat_template.jinja"
  config = directory / "tokenizer_config.json"
  if template.exists():
    parts["template"] = template.read_text(encoding="utf-8")
  elif config.exists():
    parts["template"] = shards.read_json(config).get("chat_template")
  raw = json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()
  return hashlib.sha256(raw).hexdigest()


def _check_files(directory: pathlib.Path, manifest: Manifest) -> None:
  """Rejects missing, unexpected and linked files, and other sizes."""
  found = {path.name: path.lstat() for path in directory.iterdir()}
  expected = manifest.files.keys() | {NAME}
  if found.keys() != expected:
    wrong = sorted(found.keys() ^ expected)[:8]
    raise _invalid(directory, f"files differ from the manifest: {wrong}")
  for name, file in manifest.files.items():
    if not stat.S_ISREG(found[name].st_mode):
      raise _invalid(directory / name, "it is not a regular file")
    if found[name].st_size != file.size:
      raise _invalid(
        directory / name,
        f"it has {found[name].st_size} bytes, not {file.size}",
      )


def _check_bytes(directory: pathlib.Path, manifest: Manifest) -> set[str]:
  """Reads all files in parallel and rejects altered ones.

  Returns:
    The files that may hold an infinity or a NaN.
  """
  kinds = {tensor.dtype for tensor in manifest.tensors.values()}

  def is_suspect(name: str) -> bool:
    found, suspect = _scan(directory / name, kinds)
    if found != manifest.files[name]:
      raise _invalid(directory / name, "its digest differs from the manifest")
    return suspect

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    suspects = pool.map(is_suspect, manifest.files)
    return set(itertools.compress(manifest.files, suspects))


def _scan(path: pathlib.Path, kinds: Collection[str]) -> tuple[File, bool]:
  """Reads a file once; returns size, digest, and whether it may be non-finite.

  All bytes are interpreted as values of each dtype in `kinds`, to whose size
  tensors are aligned. Bytes outside of tensors may cause a false positive.
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
  """Checks the files' headers against the manifest."""
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
    raise _invalid(directory, f"tensors differ from the manifest: {wrong[:8]}")
  return tensors


def _shown(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
  return str(list(shapes[name])) if name in shapes else "none"


def _invalid(path: pathlib.Path, why: str) -> errors.CheckpointError:
  return errors.CheckpointError(
    "Invalid pushed weights.",
    where=str(path),
    why=f"{why}.",
    fix="Push them again as a new version.",
  )
