# SPDX-License-Identifier: Apache-2.0
"""Converts adapters to and from PEFT directories, and merges them."""

from collections.abc import Mapping
import dataclasses
import math
import pathlib
from typing import Any

import jax
import numpy as np

from atlas_jax import errors
from atlas_jax.models import decoder, lora
from conversion import arrays, card, header, rules, save, shards, target

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_A, _B = "lora_A.weight", "lora_B.weight"
# Rows of a kernel merged at once, to avoid a float32 copy of the kernel.
_NUM_ROWS = 1024

# Supported: read here, or implied by the names and shapes of the tensors.
_READ = {
  "peft_type",
  "task_type",
  "bias",
  "r",
  "lora_alpha",
  "use_rslora",
  "init_lora_weights",
  "target_modules",
  "exclude_modules",
  "layers_to_transform",
  "layers_pattern",
}
# Ignored: these do not change the weights in the files.
_WITHOUT_EFFECT = {
  "base_model_name_or_path",
  "base_model_class",
  "revision",
  "peft_version",
  "auto_mapping",
  "inference_mode",
  "lora_dropout",
  "megatron_core",
  "qalora_group_size",
  "runtime_config",
}
# Other initializations, such as PiSSA, may have changed the base as well.
_STARTS = (None, True, False, "gaussian", "orthogonal")


@dataclasses.dataclass(frozen=True)
class Adapter:
  """An opened adapter directory.

  Attributes:
    directory: where the files are.
    rank: of every A and B.
    scale: factor of the product B A.
    pairs: A and B, by the name of the base's tensor that they are added to.
  """

  directory: pathlib.Path
  rank: int
  scale: float
  pairs: Mapping[str, tuple[header.Tensor, header.Tensor]]


def save_directory(
  directory: pathlib.Path,
  adapters: decoder.Params,
  model: decoder.Model,
  *,
  settings: lora.Lora,
  source: pathlib.Path,
  about: card.Card,
) -> None:
  """Writes adapters in float32, completely or not at all.

  Args:
    directory: the target; it is replaced if it exists.
    adapters: as `lora.init` returns them.
    model: the base, without adapters.
    settings: of the adapters.
    source: the base's directory.
    about: contents of the model card.

  Raises:
    errors.ConfigError: if PEFT cannot represent the adapters.
    errors.CheckpointError: if a weight is not finite, the disk is full, or the
      file read back differs.
  """
  named = tensors(adapters, model)
  fields = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": about.base,
    "r": settings.rank,
    "lora_alpha": settings.alpha,
    "target_modules": sorted({name.split(".")[-3] for name in named}),
    "lora_dropout": 0.0,
    "bias": "none",
    "inference_mode": True,
  }
  with target.writing(directory) as partial:
    digests = shards.write_files(
      partial,
      {_WEIGHTS: list(named)},
      {name: array.shape for name, array in named.items()},
      named.__getitem__,
      dtype="float32",
    )
    shards.write_json(partial / _CONFIG, fields)
    card.write(partial, about, source=source, library="peft", digests=digests)


def open_directory(directory: pathlib.Path) -> Adapter:
  """Reads an adapter's config and lists its tensors; reads no values.

  Raises:
    errors.CheckpointError: if a setting is unsupported or a file is malformed.
  """
  fields = shards.read_json(directory / _CONFIG)
  _check_fields(directory, fields)
  rank, alpha = fields["r"], fields["lora_alpha"]
  if not (directory / _WEIGHTS).exists():
    raise _unsupported(
      directory,
      f"It has no {_WEIGHTS}",
      "Save it again with safe_serialization=True; pickled files are not read.",
    )
  found = header.read(directory / _WEIGHTS)
  stems = {
    name.removeprefix(_PREFIX).removesuffix(_A)
    for name in found
    if name.startswith(_PREFIX) and name.endswith(_A)
  }
  known = {f"{_PREFIX}{stem}{end}" for stem in stems for end in (_A, _B)}
  if not stems or known != found.keys():
    odd = sorted(known ^ found.keys())
    raise _unsupported(
      directory, f"Tensors are not in pairs of A and B: {odd[:4] or 'none'}"
    )
  pairs = {
    f"{stem}weight": (found[_PREFIX + stem + _A], found[_PREFIX + stem + _B])
    for stem in sorted(stems)
  }
  for name, (a, b) in pairs.items():
    if len(a.shape) != 2 or (a.shape[0], *b.shape[1:]) != (rank, rank):
      why = f"Rank is {rank}, but {name} has A {a.shape} and B {b.shape}"
      raise _unsupported(directory, why)
  scale = alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank)
  return Adapter(directory, rank, scale, pairs)


def load(
  directory: pathlib.Path, model: decoder.Model, settings: lora.Lora
) -> decoder.Params:
  """Loads adapters in float32, with the structure of `lora.init`.

  Args:
    directory: in PEFT format.
    model: the base, without adapters.
    settings: expected rank, alpha and targets of the adapters.

  Raises:
    errors.ConfigError: if the adapters in the directory do not match
      `settings`.
    errors.CheckpointError: see `open_directory`; or a weight is not finite.
  """
  if not has_names(model):
    raise _unsupported(
      directory, f"The files of {model.config.family} fuse projections", _MERGE
    )
  adapter = open_directory(directory)
  _check_scale(adapter, settings)
  abstract = lora.only(lora.adapt(model, settings).abstract_params)
  wanted = _names(abstract, model)
  if wanted.keys() != adapter.pairs.keys():
    odd = sorted(wanted.keys() ^ adapter.pairs.keys())
    raise errors.ConfigError(
      "The adapters do not match --config.lora.targets.",
      where=f"--config.lora.path={directory}",
      why=f"{len(odd)} layers are on one side only: {', '.join(odd[:4])}.",
      fix="Set --config.lora.targets to the layers in that directory.",
    )
  check_shapes(adapter, model)
  leaves = dict(rules.flatten(abstract))
  filled = {
    path: np.empty(leaf.shape, np.float32) for path, leaf in leaves.items()
  }
  for name, (path, layer) in wanted.items():
    for end, tensor in zip(
      ("lora_a", "lora_b"), adapter.pairs[name], strict=True
    ):
      values = shards.read(tensor).astype(np.float32)
      arrays.check_finite(name, values)
      into = filled[f"{path}/{end}"]
      into[layer] = values.T.reshape(into.shape[1:])
  return jax.tree.unflatten(
    jax.tree.structure(abstract), [filled[path] for path in leaves]
  )


def merging(
  adapter: Adapter, base: Mapping[str, header.Tensor], dtype: str
) -> save.Fetch:
  """Returns a function that reads a tensor of the base with its adapter added.

  W + scale B A is computed in float32, a block of rows at a time.
  """

  def fetch(name: str) -> np.ndarray:
    kernel = shards.read(base[name])
    if name not in adapter.pairs:
      return kernel
    a, b = (shards.read(t).astype(np.float32) for t in adapter.pairs[name])
    merged = np.empty(kernel.shape, dtype)
    for start in range(0, len(kernel), _NUM_ROWS):
      rows = slice(start, start + _NUM_ROWS)
      added = adapter.scale * (b[rows] @ a)
      merged[rows] = kernel[rows].astype(np.float32) + added
    return merged

  return fetch


def check_shapes(adapter: Adapter, model: decoder.Model) -> None:
  """Rejects an adapter whose tensors do not fit the model, by name and shape.

  Raises:
    errors.CheckpointError: naming some that differ.
  """
  base = rules.shapes(model)
  odd = [
    f"{name} is {base.get(name, 'missing')}, not {(b.shape[0], a.shape[1])}"
    for name, (a, b) in adapter.pairs.items()
    if base.get(name) != (b.shape[0], a.shape[1])
  ]
  if odd:
    raise _unsupported(
      adapter.directory,
      f"{len(odd)} tensors do not fit the base: {'; '.join(odd[:4])}",
      "Pass the model that the adapter was trained on.",
    )


def has_names(model: decoder.Model) -> bool:
  """Returns whether every projection has its own tensor in the model's files.

  PEFT stores one adapter for each tensor of the files.
  """
  names = [rule.name for rule in rules.of_model(model)]
  return len(names) == len(set(names))


def tensors(
  adapters: decoder.Params, model: decoder.Model
) -> Mapping[str, np.ndarray]:
  """Returns the adapters of every layer by their names in PEFT.

  Raises:
    errors.ConfigError: if the family fuses projections in its files.
  """
  if not has_names(model):
    raise errors.ConfigError(
      f"PEFT cannot represent adapters of {model.config.family}.",
      where="family of the model",
      why="Its files fuse several projections into one tensor.",
      fix="Write the merged model.",
    )
  found = {}
  flat = dict(rules.flatten(adapters))
  for name, (path, layer) in _names(adapters, model).items():
    a = np.asarray(flat[f"{path}/lora_a"][layer], np.float32)
    b = np.asarray(flat[f"{path}/lora_b"][layer], np.float32)
    rank, prefix = a.shape[-1], _PREFIX + name.removesuffix("weight")
    found[prefix + _A] = a.reshape(-1, rank).T
    found[prefix + _B] = b.reshape(rank, -1).T
  return found


def _names(
  adapters: decoder.Params, model: decoder.Model
) -> dict[str, tuple[str, int]]:
  """Maps the name of each adapted tensor of the base to (path, layer)."""
  paths = {path for path, _ in rules.flatten(adapters)}
  return {
    rule.name.format(layer=layer): (path, layer)
    for rule in rules.of_model(model)
    if f"{(path := rule.path.removesuffix('/kernel'))}/lora_a" in paths
    for layer in range(model.config.num_layers)
  }


def _check_scale(adapter: Adapter, settings: lora.Lora) -> None:
  alpha = adapter.scale * adapter.rank
  if settings.rank != adapter.rank or not math.isclose(
    settings.alpha, alpha, rel_tol=1e-6
  ):
    raise errors.ConfigError(
      "The adapters do not match --config.lora.rank and alpha.",
      where=f"--config.lora.path={adapter.directory}",
      why=f"The config has rank {settings.rank} and alpha {settings.alpha}.",
      fix=f"Set --config.lora.rank={adapter.rank} and "
      f"--config.lora.alpha={alpha!r}, which match the adapters.",
    )


def _check_fields(
  directory: pathlib.Path,
  fields: Mapping[str, Any],  # Any: JSON.
) -> None:
  """Rejects unsupported settings, naming their fields."""
  odd = {
    name: value
    for name, value in fields.items()
    if name not in _READ | _WITHOUT_EFFECT and value
  }
  if (start := fields.get("init_lora_weights")) not in _STARTS:
    odd["init_lora_weights"] = start
  if fields.get("peft_type") != "LORA" or fields.get("bias", "none") != "none":
    odd |= {name: fields.get(name) for name in ("peft_type", "bias")}
  rank, alpha = fields.get("r"), fields.get("lora_alpha")
  if not (isinstance(rank, int) and rank > 0):
    odd["r"] = rank
  if not (isinstance(alpha, int | float) and alpha > 0):
    odd["lora_alpha"] = alpha
  if odd:
    listed = ", ".join(f"{name}={value!r}" for name, value in odd.items())
    raise _unsupported(directory / _CONFIG, f"Unsupported settings: {listed}")


_MERGE = "Merge it into its base with PEFT, and train from the merged model."


def _unsupported(
  where: pathlib.Path, why: str, fix: str = _MERGE
) -> errors.CheckpointError:
  return errors.CheckpointError(
    "Unsupported adapter.", where=str(where), why=f"{why}.", fix=fix
  )
