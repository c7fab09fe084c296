# SPDX-License-Identifier: Apache-2.0
"""Adapters become a directory that PEFT opens."""

from collections.abc import Mapping
import hashlib
import os
import pathlib
import shutil

import numpy as np

from atlas_jax import errors
from atlas_jax.models import decoder, lora
from conversion import rules, shards

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save(
  directory: pathlib.Path,
  adapters: decoder.Params,
  model: decoder.Model,
  *,
  settings: lora.Lora,
  base: str,
) -> None:
  """Writes adapters in float32, whole or not at all.

  Args:
    directory: the target; what is there is replaced.
    adapters: as `lora.init` makes them.
    model: the base, without adapters.
    settings: the adapters'.
    base: path or name of the base model, for those who open the directory.

  Raises:
    ValueError: if PEFT has no names for them.
    errors.CheckpointError: if a weight is not finite, the disk is full, or the
      file read back differs.
  """
  arrays = tensors(adapters, model)
  fields = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "r": settings.rank,
    "lora_alpha": settings.alpha,
    "target_modules": sorted({name.split(".")[-3] for name in arrays}),
    "lora_dropout": 0.0,
    "bias": "none",
    "inference_mode": True,
  }
  directory = directory.absolute()
  partial = directory.with_name(f"{directory.name}.tmp-{os.getpid()}")
  try:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    digest = shards.write_file(
      partial / _WEIGHTS,
      {name: array.shape for name, array in arrays.items()},
      arrays.__getitem__,
      dtype="float32",
      digest=hashlib.sha256(),
    )
    _check_read_back(partial / _WEIGHTS, digest)
    shards.write_json(partial / _CONFIG, fields)
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)
  except OSError as error:
    raise errors.CheckpointError(
      "The adapters cannot be written.",
      where=str(directory),
      why=str(error),
      fix="Check the space and the permissions there.",
    ) from error
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def has_names(model: decoder.Model) -> bool:
  """Tells whether every projection is a tensor of its own in the files.

  PEFT has one adapter for each of their tensors.
  """
  names = [rule.name for rule in rules.of_model(model)]
  return len(names) == len(set(names))


def tensors(
  adapters: decoder.Params, model: decoder.Model
) -> Mapping[str, np.ndarray]:
  """Gives every layer's adapters by the names that PEFT has for them.

  Raises:
    ValueError: if it has none.
  """
  if not has_names(model):
    raise ValueError(f"PEFT has no names for {model.config.family}.")
  found = {}
  arrays = dict(rules.flatten(adapters))
  for rule in rules.of_model(model):
    path = rule.path.removesuffix("/kernel")
    if f"{path}/lora_a" not in arrays:
      continue
    a_LIR = np.asarray(arrays[f"{path}/lora_a"], np.float32)
    b_LRO = np.asarray(arrays[f"{path}/lora_b"], np.float32)
    rank = a_LIR.shape[-1]
    for layer, (a, b) in enumerate(zip(a_LIR, b_LRO, strict=True)):
      name = rule.name.format(layer=layer).removesuffix("weight")
      prefix = f"base_model.model.{name}"
      found[f"{prefix}lora_A.weight"] = a.reshape(-1, rank).T
      found[f"{prefix}lora_B.weight"] = b.reshape(rank, -1).T
  return found


def _check_read_back(path: pathlib.Path, expected: str) -> None:
  with path.open("rb") as file:
    if hashlib.file_digest(file, "sha256").hexdigest() != expected:
      raise errors.CheckpointError(
        "The adapters read back are not what was written.",
        where=str(path),
        why="The file's digest is another.",
        fix="Check the disk; nothing was left behind.",
      )
