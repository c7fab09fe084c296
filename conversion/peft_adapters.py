# SPDX-License-Identifier: Apache-2.0
"""Adapters to and from a directory as PEFT has it, and into their base."""

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
# Rows of a kernel merged at once, so that no second kernel is in memory.
_NUM_ROWS = 1024

# Honoured, by what the tensors are called and shaped if not by name.
_READ = {
  *("peft_type", "task_type", "bias", "r", "lora_alpha", "use_rslora"),
  *("init_lora_weights", "target_modules", "exclude_modules"),
  *("layers_to_transform", "layers_pattern"),
}
# They change no weight that is in the files.
_WITHOUT_EFFECT = {
  *("base_model_name_or_path", "base_model_class", "revision", "peft_version"),
  *("auto_mapping", "inference_mode", "lora_dropout", "megatron_core"),
  *("qalora_group_size", "runtime_config"),
}
# Any other way to start may have changed the base as well.
_STARTS = (None, True, False, "gaussian", "orthogonal")


@dataclasses.dataclass(frozen=True)
class Adapter:
  """An adapter's files, opened.

  Attributes:
    directory: where they are.
    rank: of all pairs.
    scale: what the product of a pair is multiplied with.
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
  """Writes adapters in float32, whole or not at all.

  Args:
    directory: the target; what is there is replaced.
    adapters: as `lora.init` makes them.
    model: the base, without adapters.
    settings: the adapters'.
    source: the base's directory.
    about: goes into the model card.

  Raises:
    errors.ConfigError: if PEFT has no names for them.
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
    errors.CheckpointError: if it has what would not be honoured, or its files
      are malformed.
  """
  fields = shards.read_json(directory / _CONFIG)
  _check_fields(directory, fields)
  rank, alpha = fields["r"], fields["lora_alpha"]
  if not (directory / _WEIGHTS).exists():
    raise _refused(
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
    raise _refused(
      directory, f"These are no pairs of A and B: {odd[:4] or 'nothing'}"
    )
  pairs = {
    f"{stem}weight": (found[_PREFIX + stem + _A], found[_PREFIX + stem + _B])
    for stem in sorted(stems)
  }
  for name, (a, b) in pairs.items():
    if len(a.shape) != 2 or (a.shape[0], *b.shape[1:]) != (rank, rank):
      why = f"Of rank {rank}, {name} has A {a.shape} and B {b.shape}"
      raise _refused(directory, why)
  scale = alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank)
  return Adapter(directory, rank, scale, pairs)


def load(
  directory: pathlib.Path, model: decoder.Model, settings: lora.Lora
) -> decoder.Params:
  """Loads adapters in float32, as `lora.init` would make them.

  Args:
    directory: as PEFT writes it.
    model: the base, without adapters.
    settings: what adapters the model is to get.

  Raises:
    errors.ConfigError: if the directory holds others than `settings` say.
    errors.CheckpointError: see `open_directory`; or a weight is not finite.
  """
  if not has_names(model):
    raise _refused(
      directory, f"Files of {model.config.family} fuse projections", _MERGE
    )
  adapter = open_directory(directory)
  _check_scale(adapter, settings)
  abstract = lora.only(lora.adapt(model, settings).abstract_params)
  wanted = _names(abstract, model)
  if wanted.keys() != adapter.pairs.keys():
    odd = sorted(wanted.keys() ^ adapter.pairs.keys())
    raise errors.ConfigError(
      "The adapters are of other layers than are asked for.",
      where=f"--config.lora.path={directory}",
      why=f"{len(odd)} are on one side alone: {', '.join(odd[:4])}.",
      fix="Set --config.lora.targets to the layers that have one there.",
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
  """Makes the function that reads a tensor of the base with its adapter added.

  W + scale B A is computed in float32, some rows at a time.
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
  """Refuses an adapter of another model, by its tensors' names and shapes.

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
    raise _refused(
      adapter.directory,
      f"{len(odd)} tensors of the base differ: {'; '.join(odd[:4])}",
      "Give the model that it was trained on.",
    )


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
    errors.ConfigError: if it has none.
  """
  if not has_names(model):
    raise errors.ConfigError(
      f"PEFT has no names for adapters of {model.config.family}.",
      where="the family of the model",
      why="Its files hold several projections in one tensor.",
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
  """Gives the path and the layer of each adapter, by its base's tensor."""
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
      "The adapters are of another rank or scale than is asked for.",
      where=f"--config.lora.path={adapter.directory}",
      why=f"The config has rank {settings.rank} and alpha {settings.alpha}.",
      fix=f"Set --config.lora.rank={adapter.rank} and "
      f"--config.lora.alpha={alpha!r}; they scale as the adapters do.",
    )


def _check_fields(
  directory: pathlib.Path,
  fields: Mapping[str, Any],  # Any: JSON.
) -> None:
  """Refuses what is no LoRA, or more than one, by the names of the fields."""
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
    raise _refused(directory / _CONFIG, f"It has {listed}")


_MERGE = "Let PEFT merge it into its base, and train on from there."


def _refused(
  where: pathlib.Path, why: str, fix: str = _MERGE
) -> errors.CheckpointError:
  return errors.CheckpointError(
    "The adapter cannot be used.", where=str(where), why=f"{why}.", fix=fix
  )
