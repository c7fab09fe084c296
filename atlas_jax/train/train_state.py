# SPDX-License-Identifier: Apache-2.0
"""Everything that a step changes, and the memory that it lies in."""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from atlas_jax import errors, sharding

_HOST = "pinned_host"


class TrainState(NamedTuple):
  """Saved and restored as one.

  `step` counts the recipe's steps, `num_nonfinite` the updates in a row that
  were skipped because they were not finite. `params` is what is trained, which
  may be adapters alone. `reference` is None where nothing is measured from one,
  or it is the base of the adapters.
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
  abstract = describe(
    params, optimizer, mesh=mesh, reference=reference, offload=offload
  )

  # Two arrays, not one: a step donates both.
  def zero() -> jax.Array:
    return jax.device_put(jnp.zeros((), jnp.int32), abstract.step.sharding)

  # Moments are zeros, which know nothing of the parameters they belong to:
  # without this they would all lie on the first device.
  places = shardings(abstract)
  opt_state = jax.jit(optimizer.init, out_shardings=places.opt_state)(params)
  reference = jax.tree.map(jax.device_put, reference, places.reference)
  return TrainState(zero(), zero(), params, opt_state, reference)


def describe(
  params: Mapping[str, Any],
  optimizer: optax.GradientTransformation,
  *,
  mesh: jax.sharding.Mesh,
  reference: Mapping[str, Any] | None = None,
  offload: Offload = Offload(),
) -> TrainState:
  """Tells what `create` would make, of arrays or of what describes them.

  Returns:
    The state, with `jax.ShapeDtypeStruct` as leaves that know their sharding.

  Raises:
    errors.ConfigError: see `create`.
  """
  if offload.reference and reference is None:
    raise errors.ConfigError(
      "There is no reference to offload.",
      where="--config.offload.reference=True",
      why="There is none where --config.loss.kl_coef is 0, or where adapters "
      "are trained: then it is the base model without them.",
      fix="Leave it out.",
    )
  if offload.optimizer or offload.reference:
    check_host_memory(mesh, where="--config.offload")
  everywhere = sharding.replicated(mesh)
  zero: Any = jax.ShapeDtypeStruct(  # Any: it stands for an array.
    (), jnp.int32, sharding=everywhere
  )
  return TrainState(
    step=zero,
    num_nonfinite=zero,
    params=placed(params, shardings(params)),
    opt_state=placed(
      jax.eval_shape(optimizer.init, params),
      _of_moments(optimizer, params, everywhere, offload.optimizer),
    ),
    reference=placed(
      reference,
      jax.tree.map(lambda leaf: _place_of(leaf, offload.reference), reference),
    ),
  )


def placed(tree: Any, places: Any) -> Any:  # Any: a pytree, and its like.
  """Describes arrays as they would be on their shardings."""
  return jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=place
    ),
    tree,
    places,
  )


def shardings(tree: Any) -> Any:  # Any: a pytree of arrays, and its like.
  """Tells where each array lies, of a state or a part of it."""
  return jax.tree.map(lambda leaf: leaf.sharding, tree)


def on_device(tree: Any) -> Any:  # Any: a pytree of arrays, and its like.
  """Moves what waits in the host's memory to where computing is done.

  Inside `jit` it costs what is moved, and nothing where all is there already.
  """
  return jax.device_put(tree, jax.memory.Space.Device)


def check_host_memory(mesh: jax.sharding.Mesh, *, where: str) -> None:
  """Refuses the setting `where` if the devices cannot reach such memory.

  Raises:
    errors.ConfigError: see above.
  """
  device = mesh.devices.flat[0]
  kinds = [memory.kind for memory in device.addressable_memories()]
  if _HOST not in kinds:
    raise errors.ConfigError(
      "Nothing can be offloaded here.",
      where=where,
      why=f"The memories of {device} are {', '.join(kinds)}; none is {_HOST}.",
      fix="Leave offload out, or split the state over more devices.",
    )


def _of_moments(
  optimizer: optax.GradientTransformation,
  params: Mapping[str, Any],
  everywhere: jax.sharding.Sharding,
  is_offloaded: bool,
) -> Any:  # Any: a tree like the optimizer's state.
  """Tells where a moment lies: by its parameter, whose path ends its own."""
  by_name = {
    _name(path): param for path, param in jax.tree.leaves_with_path(params)
  }

  def of(path: Sequence[Any], moment: jax.ShapeDtypeStruct) -> Any:
    param = by_name.get(_name(path))
    # A factored moment is called like its parameter, but is a row of it.
    if param is None or param.shape != moment.shape:
      return everywhere
    return _place_of(param, is_offloaded)

  return jax.tree.map_with_path(of, jax.eval_shape(optimizer.init, params))


def _name(path: Sequence[Any]) -> tuple[Any, ...]:
  """The dictionary keys that end a path, the last one first."""

  def is_key(entry: object) -> bool:
    return isinstance(entry, jax.tree_util.DictKey)

  return tuple(itertools.takewhile(is_key, reversed(path)))


def _place_of(array: jax.Array, is_offloaded: bool) -> jax.sharding.Sharding:
  place = array.sharding
  return place.with_memory_kind(_HOST) if is_offloaded else place
