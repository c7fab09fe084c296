# SPDX-License-Identifier: Apache-2.0
"""Checks an export: tensors bit for bit, and logits against live parameters."""

from collections.abc import Sequence
import pathlib

import jax
import jax.numpy as jnp

from atlas_jax import errors
from atlas_jax.models import decoder
from conversion import load, shards


def differing_tensors(left: pathlib.Path, right: pathlib.Path) -> list[str]:
  """Lists the tensors of two model directories that are not bit for bit equal.

  A tensor in only one of them differs; how they are spread over files does not
  matter.

  Raises:
    errors.CheckpointError: if a directory is malformed.
  """
  a, b = shards.open_directory(left), shards.open_directory(right)
  return sorted(
    name
    for name in a.keys() | b.keys()
    if name not in a or name not in b or not _equal(a[name], b[name])
  )


def logits_equal(
  directory: pathlib.Path,
  params: decoder.Params,
  model: decoder.Model,
  *,
  token_ids: Sequence[int],
  tolerance: float,
) -> float:
  """Compares the logits of a written directory with those of live parameters.

  The live parameters are first rounded to the precision of the files, so that
  only a wrong tensor can make a difference.

  Args:
    directory: as written by `save.save`.
    params: what was written; the copy is laid out on devices as they are.
    model: what they are the parameters of.
    token_ids: the prompt both see.
    tolerance: the largest absolute difference that passes.

  Returns:
    The largest absolute difference, in float32.

  Raises:
    errors.CheckpointError: if it exceeds the tolerance.
  """
  written = next(iter(shards.open_directory(directory).values())).dtype
  rounded = jax.tree.map(lambda x: x.astype(written).astype(x.dtype), params)
  loaded = load.load(
    directory,
    model,
    param_dtype=jax.tree.leaves(params)[0].dtype.name,
    shardings=jax.tree.map(lambda x: x.sharding, params),
  )
  tokens_BT = jnp.asarray([token_ids], jnp.int32)
  positions_BT = jnp.arange(len(token_ids), dtype=jnp.int32)[None]
  segment_ids_BT = jnp.ones_like(tokens_BT)
  expected, got = (
    model.logits(tree, tokens_BT, positions_BT, segment_ids_BT)
    for tree in (rounded, loaded)
  )
  difference = float(jnp.max(jnp.abs(expected - got)))
  if not difference <= tolerance:  # A NaN fails as well.
    raise errors.CheckpointError(
      "The model written does not compute what the live one does.",
      where=str(directory),
      why=f"Logits differ by {difference}, more than {tolerance}.",
      fix="Do not use this export; export again, and report it if it recurs.",
    )
  return difference


def _equal(a: shards.Tensor, b: shards.Tensor) -> bool:
  if (a.dtype, a.shape) != (b.dtype, b.shape):
    return False
  return shards.digest(shards.read(a)) == shards.digest(shards.read(b))
