# SPDX-License-Identifier: Apache-2.0
"""Finds, lists, reads and writes orbax checkpoints of training."""

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
  """Returns the step that a path refers to, or None.

  The path may be a step, a folder of steps or a workdir; of several steps, the
  newest is returned.
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
    errors.CheckpointError: if the metadata is missing or unreadable.
  """
  if not (step / checkpoint_format.STATE).is_dir():
    raise _unreadable(step, f"It has no {checkpoint_format.STATE}/ folder")
  try:
    found = ocp.PyTreeCheckpointer().metadata(_state(step))
  except (OSError, ValueError) as error:
    raise _unreadable(step, str(error).partition("\n")[0]) from error
  if found.item_metadata is None:
    raise _unreadable(step, "Its metadata lists no arrays")
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree.leaves_with_path(found.item_metadata.tree)
  }


def _state(step: pathlib.Path) -> pathlib.Path:
  """Returns the folder of the arrays; orbax needs its absolute path."""
  return (step / checkpoint_format.STATE).absolute()


def _unreadable(step: pathlib.Path, why: str) -> errors.CheckpointError:
  return errors.CheckpointError(
    "The checkpoint cannot be opened.",
    where=str(step),
    why=f"{why}.",
    fix="Use another step, or restore the folder from a copy.",
  )


def param_headers(step: pathlib.Path) -> dict[str, Any]:  # Any: as `headers`.
  """Lists the parameters of a checkpoint by path; see `headers`."""
  start = f"{_PARAMS}/"
  return {
    path.removeprefix(start): leaf
    for path, leaf in headers(step).items()
    if path.startswith(start)
  }


def check_model(step: pathlib.Path, model: decoder.Model) -> None:
  """Rejects a checkpoint whose parameters do not match the model.

  Raises:
    errors.CheckpointError: naming some parameters that differ.
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
      "The checkpoint does not match the model.",
      where=str(step),
      why=f"{len(differing)} parameters differ: {'; '.join(differing[:4])}.",
      fix="Set --source to the directory of the model that was trained.",
    )


def adapters(step: pathlib.Path) -> lora.Lora | None:
  """Returns the adapter settings of a checkpoint; None if it has none."""
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
  """Returns the quantization of the adapters' base, or an empty text."""
  about = checkpoint_format.read(step) or {}
  return about.get("identity", {}).get("base.kept_as", "")


def check_base(step: pathlib.Path, params: decoder.Params) -> decoder.Params:
  """Checks that the adapters of a checkpoint were trained over this base.

  Args:
    step: a checkpoint of adapters.
    params: of the base, in float32 or quantized as `base_kept_as` returns.

  Returns:
    The parameters in the precision that they had in training.

  Raises:
    errors.CheckpointError: if the base in training had different values.
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
    "The adapters were trained over a different base.",
    where=str(step),
    why="The checksum of the base differs from the one in the checkpoint.",
    fix="Set --source to the directory of the model that was trained.",
  )


def read(step: pathlib.Path, model: decoder.Model) -> decoder.Params:
  """Reads the parameters of an intact checkpoint onto the first device."""
  return read_tree(step, model.abstract_params)


def read_tree(step: pathlib.Path, abstract: decoder.Params) -> decoder.Params:
  """Reads the parameters at the paths of `abstract`, one after the other.

  Orbax would read all at once and hold two copies.
  """
  leaves = [
    jax.device_put(read_one(step, path), jax.devices()[0])
    for path, _ in rules.flatten(abstract)
  ]
  return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def read_one(step: pathlib.Path, path: str) -> np.ndarray:
  """Reads one parameter of an intact checkpoint by its path."""
  tree: Any = jax.ShapeDtypeStruct((), np.float32)  # Any: a nested dict.
  for key in reversed([_PARAMS, *path.split("/")]):
    tree = {key: tree}
  how = ocp.RestoreArgs(restore_type=np.ndarray)
  arguments = ocp.args.PyTreeRestore(
    item=tree,
    restore_args=jax.tree.map(lambda _: how, tree),
    partial_restore=True,
  )
  restored = ocp.PyTreeCheckpointer().restore(_state(step), args=arguments)
  (array,) = jax.tree.leaves(restored[_PARAMS])
  return array


def write(
  partial: pathlib.Path, params: decoder.Params, *, source: pathlib.Path
) -> None:
  """Writes parameters, with the config of their model."""
  shutil.copyfile(source / _CONFIG, partial / _CONFIG)
  checkpoint_format.write(
    partial,
    {_PARAMS: params},
    identity={"converted from": str(source)},
  )
