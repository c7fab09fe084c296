# SPDX-License-Identifier: Apache-2.0
"""Everything on the devices that a step changes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class TrainState(NamedTuple):
  """Saved and restored as one.

  `step` counts the recipe's steps, `num_nonfinite` the updates in a row that
  were skipped because they were not finite. `reference` is None where nothing
  is measured from one.
  """

  step: jax.Array
  num_nonfinite: jax.Array
  params: Mapping[str, Any]  # Any: nested dicts with arrays as leaves.
  opt_state: optax.OptState
  reference: Mapping[str, Any] | None


def create(
  params: Mapping[str, Any],
  optimizer: optax.GradientTransformation,
  *,
  mesh: jax.sharding.Mesh,
  reference: Mapping[str, Any] | None = None,
) -> TrainState:
  """Starts at step 0; the optimizer's moments lie where the parameters do."""
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  # Two arrays, not one: a step donates both.
  def zero() -> jax.Array:
    return jax.device_put(jnp.zeros((), jnp.int32), everywhere)

  opt_state = jax.tree.map(
    # Counters start out on one device; all state must share the mesh.
    lambda leaf: jax.device_put(leaf, everywhere) if leaf.ndim == 0 else leaf,
    jax.jit(optimizer.init)(params),
  )
  return TrainState(zero(), zero(), params, opt_state, reference)
