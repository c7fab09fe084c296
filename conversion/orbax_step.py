# SPDX-License-Identifier: Apache-2.0
"""Orbax checkpoints, as training writes them: found, listed, read, written."""

import pathlib
import shutil
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp

from atlas_jax import checkpoint_format, errors
from atlas_jax.models import decoder, lora, quantized
from conversion import rules

_CONFIG = "config.json"
_PARAMS = "params"


def find(directory: pathlib.Path) -> pathlib.Path | None:
  """Finds the checkpoint that a path means; None if it means none.

  It may be a step, a folder of them or a workdir; then the newest step counts.
  """
  if (directory / checkpoint_format.STATE).is_dir():
    return directory
  for folder in (directory / "checkpoints", directory):
    if folder.is_dir():
      steps = [path for path in folder.iterdir() if path.name.isdecimal()]
      if steps:
        return max(steps, key=lambda path: int(path.name))
  return None


def headers(step: pathlib.Path) -> dict[str, Any]:  # Any: no public type.
  """Lists all arrays of a checkpoint, by path, without reading them.

  Returns:
    Orbax's metadata of each, with a shape, a dtype and a sharding.

  Raises:
    errors.CheckpointError: if there is no such list.
  """
  if not (step / checkpoint_format.STATE).is_dir():
    raise _unreadable(step, f"It has no folder {checkpoint_format.STATE}")
  try:
    found = ocp.PyTreeCheckpointer().metadata(step / checkpoint_format.STATE)
  except (OSError, ValueError) as error:
    raise _unreadable(step, str(error).partition("\n")[0]) from error
  if found.item_metadata is None:
    raise _unreadable(step, "It has no list of what it holds")
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree.leaves_with_path(found.item_metadata.tree)
  }


def _unreadable(step: pathlib.Path, why: str) -> errors.CheckpointError:
  return errors.CheckpointError(
    "The checkpoint cannot be opened.",
    where=str(step),
    why=f"{why}.",
    fix="Take another step, or restore the folder from a copy.",
  )


def param_headers(step: pathlib.Path) -> dict[str, Any]:  # Any: as `headers`.
  """Lists the parameters of a checkpoint by their paths, as `headers` does."""
  start = f"{_PARAMS}/"
  return {
    path.removeprefix(start): leaf
    for path, leaf in headers(step).items()
    if path.startswith(start)
  }


def check_model(step: pathlib.Path, model: decoder.Model) -> None:
  """Refuses a checkpoint whose parameters are not those of the model.

  Raises:
    errors.CheckpointError: naming some that differ.
  """
  wanted = {
    path: tuple(leaf.shape)
    for path, leaf in rules.flatten(model.abstract_params)
  }
  found = {
    path: tuple(leaf.shape) for path, leaf in param_headers(step).items()
  }
  differing = [
    f"{path} is {found.get(path, 'missing')}, not {wanted.get(path, 'known')}"
    for path in sorted(wanted.keys() | found.keys())
    if wanted.get(path) != found.get(path)
  ]
  if differing:
    raise errors.CheckpointError(
      "The checkpoint is of another model.",
      where=str(step),
      why=f"{len(differing)} parameters differ: {'; '.join(differing[:4])}.",
      fix="Give the directory of the model that was trained as --source.",
    )


def adapters(step: pathlib.Path) -> lora.Lora | None:
  """Tells what adapters a sound checkpoint holds; None if all parameters."""
  ranks = {
    path.removesuffix("/lora_a").removeprefix("layers/"): leaf.shape[-1]
    for path, leaf in param_headers(step).items()
    if path.endswith("/lora_a")
  }
  if not ranks:
    return None
  about = checkpoint_format.read(step) or {}
  return lora.Lora(
    rank=next(iter(ranks.values())),
    alpha=float(about["identity"]["lora.alpha"]),
    targets=tuple(ranks),
  )


def base_kept_as(step: pathlib.Path) -> str:
  """Tells how the base of adapters was kept, if as integers; empty if not."""
  about = checkpoint_format.read(step) or {}
  return about.get("identity", {}).get("base.kept_as", "")


def check_base(step: pathlib.Path, params: decoder.Params) -> decoder.Params:
  """Refuses a base that the adapters of a checkpoint were not trained over.

  Args:
    step: holds adapters.
    params: of the base, in float32 or kept as `base_kept_as` tells.

  Returns:
    The parameters in the precision that they had in training.

  Raises:
    errors.CheckpointError: if their values were others.
  """
  about = checkpoint_format.read(step) or {}
  is_rounded = quantized.kind_of(params) is not None
  for dtype in (None,) if is_rounded else (np.float32, ml_dtypes.bfloat16):
    held = jax.tree.map(
      lambda leaf, to=dtype: leaf.astype(to or leaf.dtype), params
    )
    if lora.fingerprint(lora.checksums(held)) == about["identity"]["base"]:
      return held
  raise errors.CheckpointError(
    "These adapters were trained over another base.",
    where=str(step),
    why="The base's weights are not those that the checkpoint names.",
    fix="Give the directory of the model that was trained as --source.",
  )


def read(step: pathlib.Path, model: decoder.Model) -> decoder.Params:
  """Reads a sound checkpoint's parameters as they are, on the first device."""
  return read_tree(step, model.abstract_params)


def read_tree(step: pathlib.Path, abstract: decoder.Params) -> decoder.Params:
  """Reads what has these paths, as `read` does, one after the other.

  Orbax would read all at once, and hold everything twice.
  """
  leaves = [
    jax.device_put(read_one(step, path), jax.devices()[0])
    for path, _ in rules.flatten(abstract)
  ]
  return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def read_one(step: pathlib.Path, path: str) -> np.ndarray:
  """Reads one array of a sound checkpoint's parameters, by its path."""
  tree: Any = jax.ShapeDtypeStruct((), np.float32)  # Any: a nested dict.
  for key in reversed([_PARAMS, *path.split("/")]):
    tree = {key: tree}
  how = ocp.RestoreArgs(restore_type=np.ndarray)
  arguments = ocp.args.PyTreeRestore(
    item=tree,
    restore_args=jax.tree.map(lambda _: how, tree),
    partial_restore=True,
  )
  restored = ocp.PyTreeCheckpointer().restore(
    step / checkpoint_format.STATE, args=arguments
  )
  (array,) = jax.tree.leaves(restored[_PARAMS])
  return array


def write(
  partial: pathlib.Path, params: decoder.Params, *, source: pathlib.Path
) -> None:
  """Writes parameters, with the config of the model that they are of."""
  shutil.copyfile(source / _CONFIG, partial / _CONFIG)
  checkpoint_format.write(
    partial,
    {_PARAMS: params},
    identity={"converted from": str(source)},
  )
