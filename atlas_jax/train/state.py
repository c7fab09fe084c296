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

  shardings = optax.tree.map_params(
    optimizer,
    lambda _, param: param.sharding,
    jax.eval_shape(optimizer.init, params),
    params,
    transform_non_params=lambda _: everywhere,
  )
  # Moments are zeros, which know nothing of the parameters they belong to:
  # without this they would all lie on the first device.
  opt_state = jax.jit(optimizer.init, out_shardings=shardings)(params)
  return TrainState(zero(), zero(), params, opt_state, reference)


def shardings(state: TrainState) -> Any:  # Any: mirrors the tree.
  """Tells where each array of the state lies."""
  return jax.tree.map(lambda leaf: leaf.sharding, state)
