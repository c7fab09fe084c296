# SPDX-License-Identifier: Apache-2.0
"""Reads GGUF files: tensors, dequantized and renamed, config and tokenizer.

The package `gguf` of llama.cpp parses and dequantizes. Its converter permutes
the rows of Llama's queries and keys and adds one to Gemma's norm scales; both
are undone here.
"""

from collections.abc import Collection, Iterator, Mapping
import contextlib
import dataclasses
import functools
import importlib
import json
import pathlib
import re
from typing import Any

import numpy as np
import tokenizers
from tokenizers import normalizers, pre_tokenizers
import transformers

from atlas_jax import errors
from atlas_jax.models import decoder, decoder_config
from conversion import gguf_config, rules, shards, weights

# All exceptions that the reader of `gguf` raises for malformed files.
_MALFORMED = (ValueError, IndexError, KeyError, TypeError, OverflowError)
_EXPERT = re.compile(r"(?<=experts\.)(\d+)\.")
_MAX_LISTED = 8
# Of byte-level tokenizers; transformers knows more, and takes an unknown one
# for GPT-2's.
_GPT2_SPLIT = "gpt-2"
_DIGIT_SPLIT = "smollm"
_NORMALIZED_SPLIT = "qwen2"
_SPECIAL = {
  "bos_token": "tokenizer.ggml.bos_token_id",
  "eos_token": "tokenizer.ggml.eos_token_id",
  "pad_token": "tokenizer.ggml.padding_token_id",
  "unk_token": "tokenizer.ggml.unknown_token_id",
}


@dataclasses.dataclass(frozen=True)
class File:
  """An opened file: metadata by key, and tensors of the package by name."""

  path: pathlib.Path
  metadata: Mapping[str, Any]  # Any: scalars, texts and lists.
  tensors: Mapping[str, Any]  # Any: gguf.ReaderTensor, an optional package.

  @property
  def architecture(self) -> str:
    """The model's family, as GGUF names it."""
    return self.metadata.get("general.architecture", "")

  @property
  def kinds(self) -> list[str]:
    """The formats of the matrices, such as Q4_1, sorted."""
    matrices = (each for each in self.tensors.values() if len(each.shape) > 1)
    return sorted({each.tensor_type.name for each in matrices})


def open_file(path: pathlib.Path) -> File:
  """Opens a file; tensors are memory-mapped.

  Raises:
    errors.ConfigError: if the package `gguf` is not installed.
    errors.CheckpointError: if the file is absent, not in GGUF format, or
      malformed.
  """
  gguf = _package()
  try:
    with path.open("rb") as file:
      magic = file.read(4)
  except OSError as error:
    raise _bad(path, "The file cannot be opened", str(error)) from error
  if magic != b"GGUF":
    raise _bad(
      path, "The file is not in GGUF format", f"It starts with {magic!r}"
    )
  try:
    reader = gguf.GGUFReader(path)
    metadata = {key: each.contents() for key, each in reader.fields.items()}
  except _MALFORMED as error:
    raise _bad(
      path,
      "The GGUF file is malformed or incomplete",
      f"{type(error).__name__}: {error}",
    ) from error
  return File(path, metadata, {each.name: each for each in reader.tensors})


def build(file: File, ignore_fields: Collection[str]) -> decoder.Model:
  """Builds the file's model.

  Raises:
    errors.CheckpointError: if it is unsupported.
  """
  fields = _config_fields(file)
  with _naming(file.path):
    config = decoder_config.from_hf(fields, ignore_fields=ignore_fields)
  return decoder.build(
    config, dtype="float32", attention="xla", remat="none", unroll=1
  )


def of_model(file: File, model: decoder.Model) -> weights.Weights:
  """Lists the tensors of a model by their Hugging Face names.

  Each is dequantized to float32 when it is read.

  Raises:
    errors.CheckpointError: if tensors are missing, unexpected or of the wrong
      shape; all in one list.
  """
  gguf = _package()
  names = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
  table = gguf.get_tensor_name_map(
    names[file.architecture], model.config.num_layers
  )
  found: dict[str, weights.Weight] = {}
  unused, problems = {*file.tensors} - {gguf_config.FREQUENCIES}, []
  for name, shape in rules.shapes(model).items():
    # All experts of a layer share one tensor.
    stem, _, suffix = _EXPERT.sub("", name).rpartition(".")
    theirs = f"{table.get_name(stem)}.{suffix}"
    expert = _EXPERT.search(name)
    index = () if expert is None else (int(expert[1]),)
    stored = file.tensors.get(theirs)
    if stored is None:
      problems.append(f"{theirs} is missing")
      continue
    unused.discard(theirs)
    sizes = tuple(map(int, stored.shape[::-1]))[len(index) :]
    if sizes != shape:
      problems.append(f"{theirs} is {sizes}, not {shape}")
    read = functools.partial(_read, model, name, stored, index)
    found[name] = weights.Weight(np.dtype(np.float32), shape, read)
  problems += [f"{name} is unexpected" for name in sorted(unused)]
  if problems:
    more = f" and {len(problems) - _MAX_LISTED} more"
    listed = ", ".join(problems[:_MAX_LISTED])
    raise _bad(
      file.path,
      "The tensors do not match the metadata",
      listed + more * (len(problems) > _MAX_LISTED),
    )
  return found


def write_source(file: File, directory: pathlib.Path) -> None:
  """Writes all files of a Hugging Face directory but the weights.

  Raises:
    errors.CheckpointError: if the tokenizer is of an unknown kind.
  """
  fields = _config_fields(file)
  shards.write_json(directory / "config.json", fields)
  keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot"))
  ends = {file.metadata[key] for key in keys if key in file.metadata}
  ids = {key: fields[key] for key in fields if key.endswith("_token_id")}
  if len(ends) > 1:
    ids["eos_token_id"] = sorted(ends)
  shards.write_json(directory / "generation_config.json", ids)
  tokenizer(file, fields["max_position_embeddings"]).save_pretrained(directory)
  if license_name := file.metadata.get("general.license"):
    # The model card of the export copies it from here.
    head = json.dumps({"license": license_name})
    (directory / "README.md").write_text(f"---\n{head}\n---\n", "utf-8")


def tokenizer(
  file: File, max_length: int
) -> transformers.PreTrainedTokenizerFast:
  """Returns the file's tokenizer with its special tokens and chat template.

  Raises:
    errors.CheckpointError: if it is of an unknown kind.
  """
  held = {
    key.removeprefix("tokenizer.ggml."): value
    for key, value in file.metadata.items()
    if key.startswith("tokenizer.")
  }
  try:
    settings = {
      name: held["tokens"][file.metadata[key]]
      for name, key in _SPECIAL.items()
      if key in file.metadata
    }
  except _MALFORMED as error:
    raise _bad(
      file.path, "The vocabulary lacks a special token", str(error)
    ) from error
  # llama.cpp adds a leading BOS to SentencePiece vocabularies by default.
  settings["add_bos_token"] = held.get(
    "add_bos_token", held["model"] == "llama"
  )
  if template := file.metadata.get("tokenizer.chat_template"):
    settings["chat_template"] = template
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=_backend(file, held),
    model_max_length=max_length,
    clean_up_tokenization_spaces=False,
    **settings,
  )


def _backend(
  file: File,
  held: Mapping[str, Any],  # Any: as the metadata.
) -> tokenizers.Tokenizer:
  """Builds the tokenizer without its settings, as transformers does."""
  # Not at the top: transformers imports the tokenizers of five families.
  convert = importlib.import_module("transformers.integrations.gguf")
  table = importlib.import_module(
    "transformers.integrations.gguf.gguf_tokenizer_mapping"
  )
  names = table.GGUF_TOKENIZER_MAPPING["tokenizer"].items()
  known = {
    name: held[short]
    for key, name in names
    if (short := key.removeprefix("ggml.")) in held
  }
  kind, split = held.get("model"), held.get("pre")
  splits = {_GPT2_SPLIT, _DIGIT_SPLIT, *table.GGUF_PRE_TOKENIZER_SPLITS}
  if kind == "gpt2" and split not in splits:
    raise _bad(
      file.path,
      "Unsupported tokenizer",
      f"tokenizer.ggml.pre={split!r} is not one of {sorted(splits)}",
    )
  try:
    backend, _ = convert.convert_gguf_tokenizer(file.architecture, known)
  except (*_MALFORMED, AttributeError) as error:
    raise _bad(
      file.path, "Unsupported tokenizer", f"{type(error).__name__}: {error}"
    ) from error
  if split == _DIGIT_SPLIT:
    backend.pre_tokenizer = pre_tokenizers.Sequence(
      [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
      ]
    )
  elif split == _NORMALIZED_SPLIT:
    backend.normalizer = normalizers.NFC()
  return backend


def _read(
  model: decoder.Model,
  name: str,
  stored: Any,  # Any: gguf.ReaderTensor.
  index: tuple[int, ...],
) -> np.ndarray:
  """Dequantizes a tensor, or one expert's part, and undoes the conversion."""
  try:
    values = _package().dequantize(stored.data[index], stored.tensor_type)
  except NotImplementedError as error:
    raise errors.CheckpointError(
      "Unsupported quantization.",
      where=stored.name,
      why=f"The package gguf cannot dequantize {stored.tensor_type.name}.",
      fix="Use a file of another quantization.",
    ) from error
  values = np.asarray(values, np.float32)
  config = model.config
  if config.zero_centered_norms and name.endswith("norm.weight"):
    return values - np.float32(1.0)
  projection = re.search(r"self_attn\.([qk])_proj\.", name)
  if config.family == "llama" and projection:
    # GGUF rotates neighbouring rows; Hugging Face row i and row i + H / 2.
    heads = config.num_heads if projection[1] == "q" else config.num_kv_heads
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)
  return values


def _config_fields(file: File) -> dict[str, Any]:  # Any: JSON.
  """Returns the fields of `config.json`, with the file's path in errors."""
  divisors = file.tensors.get(gguf_config.FREQUENCIES)
  with _naming(file.path):
    return gguf_config.config_fields(
      file.metadata,
      {
        name: tuple(map(int, each.shape[::-1]))
        for name, each in file.tensors.items()
      },
      None if divisors is None else np.asarray(divisors.data, np.float32),
    )


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
  """Names the file in errors of functions that do not know it."""
  try:
    yield
  except errors.CheckpointError as error:
    raise errors.CheckpointError(
      error.what, where=str(path), why=error.why, fix=error.fix
    ) from error


def _package() -> Any:  # Any: an optional package.
  try:
    return importlib.import_module("gguf")
  except ImportError as error:
    raise errors.ConfigError(
      "GGUF files need the package gguf.",
      where="from_gguf",
      why=str(error),
      fix="Install it: pip install gguf, or requirements/real.txt.",
    ) from error


def _bad(path: pathlib.Path, what: str, why: str) -> errors.CheckpointError:
  return errors.CheckpointError(
    f"{what}.",
    where=str(path),
    why=f"{why}.",
    fix="Check the path, or download the file again.",
  )
