# SPDX-License-Identifier: Apache-2.0
"""Everything that a step changes, and the memory that it lies in."""

from collections.abc import Mapping
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from atlas_jax import errors

_HOST = "pinned_host"


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Offload:
  """What waits in the host's memory until a step needs it.

  The numbers stay the same, bit for bit; each step moves them over the bus. It
  has not been run on a GPU or TPU yet.
  """

  optimizer: bool = False  # Its moments: twice the parameters, with AdamW.
  reference: bool = False


def create(
  params: Mapping[str, Any],
  optimizer: optax.GradientTransformation,
  *,
  mesh: jax.sharding.Mesh,
  reference: Mapping[str, Any] | None = None,
  offload: Offload = Offload(),
) -> TrainState:
  """Starts at step 0; the optimizer's moments are split as the parameters are.

  Raises:
    errors.ConfigError: if something is to be offloaded that is not there, or
      the devices cannot reach the host's memory.
  """
  if offload.reference and reference is None:
    raise errors.ConfigError(
      "There is no reference to offload.",
      where="--config.offload.reference=True",
      why="Nothing is measured from one where --config.loss.kl_coef is 0.",
      fix="Leave it out.",
    )
  if offload.optimizer or offload.reference:
    _check_host_memory(mesh)
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  def placed(array: jax.Array, is_offloaded: bool) -> jax.sharding.Sharding:
    sharding = array.sharding
    return sharding.with_memory_kind(_HOST) if is_offloaded else sharding

  # Two arrays, not one: a step donates both.
  def zero() -> jax.Array:
    return jax.device_put(jnp.zeros((), jnp.int32), everywhere)

  shardings = optax.tree.map_params(
    optimizer,
    lambda _, param: placed(param, offload.optimizer),
    jax.eval_shape(optimizer.init, params),
    params,
    transform_non_params=lambda _: everywhere,
  )
  # Moments are zeros, which know nothing of the parameters they belong to:
  # without this they would all lie on the first device.
  opt_state = jax.jit(optimizer.init, out_shardings=shardings)(params)
  if reference is not None:
    reference = jax.tree.map(
      lambda leaf: jax.device_put(leaf, placed(leaf, offload.reference)),
      reference,
    )
  return TrainState(zero(), zero(), params, opt_state, reference)


def shardings(state: TrainState) -> Any:  # Any: mirrors the tree.
  """Tells where each array of the state lies."""
  return jax.tree.map(lambda leaf: leaf.sharding, state)


def on_device(tree: Any) -> Any:  # Any: a pytree of arrays, and its like.
  """Moves what waits in the host's memory to where computing is done.

  Inside `jit` it costs what is moved, and nothing where all is there already.
  """
  return jax.device_put(tree, jax.memory.Space.Device)


def _check_host_memory(mesh: jax.sharding.Mesh) -> None:
  device = mesh.devices.flat[0]
  kinds = [memory.kind for memory in device.addressable_memories()]
  if _HOST not in kinds:
    raise errors.ConfigError(
      "Nothing can be offloaded here.",
      where="--config.offload",
      why=f"The memories of {device} are {', '.join(kinds)}; none is {_HOST}.",
      fix="Leave offload out, or split the state over more devices.",
    )
