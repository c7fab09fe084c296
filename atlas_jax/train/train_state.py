# SPDX-License-Identifier: Apache-2.0
"""The training state, its shardings and its memory kinds."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from atlas_jax import errors, sharding, types
from atlas_jax.train import optimizer as train_optimizer
from atlas_jax.train import schedule

_HOST = "pinned_host"


class TrainState(NamedTuple):
  """The state of training, saved and restored as a unit.

  Attributes:
    step: number of the recipe's steps done.
    num_nonfinite: number of consecutive skipped non-finite updates.
    params: the trained parameters, possibly only adapters.
    opt_state: the optimizer's state.
    reference: parameters of the reference; None if there is no KL term, or if
      the reference is the adapters' base.
  """

  step: jax.Array
  num_nonfinite: jax.Array
  params: Mapping[str, Any]  # Any: nested dicts with arrays as leaves.
  opt_state: optax.OptState
  reference: Mapping[str, Any] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Offload:
  """What is kept in host memory between steps.

  Results are bitwise the same; each step transfers the data to the device. Not
  tested on a GPU or TPU yet.
  """

  optimizer: bool = False  # The moments: twice the parameters with AdamW.
  reference: bool = False


def start(
  params: Mapping[str, Any],
  config: types.Config,
  *,
  num_steps: int,
  mesh: jax.sharding.Mesh,
  reference: Mapping[str, Any] | None = None,
) -> tuple[
  Callable[[int], jax.Array], optax.GradientTransformationExtraArgs, TrainState
]:
  """Creates the learning rate, the optimizer and the state of a run.

  Args:
    params: the initial trained parameters.
    config: sections `schedule`, `optimizer` and `offload`.
    num_steps: total number of steps.
    mesh: of the parameters.
    reference: see `create`.

  Returns:
    The rate by the number of steps done, jitted; the optimizer; the state.

  Raises:
    errors.ConfigError: see `schedule.make`, `optimizer.make_optimizer` and
      `create`.
  """
  rate = schedule.make(**config.schedule, num_steps=num_steps)
  optimizer = train_optimizer.make_optimizer(rate, **config.optimizer)
  offload = Offload(**config.offload)
  state = create(
    params, optimizer, mesh=mesh, reference=reference, offload=offload
  )
  return jax.jit(rate), optimizer, state


def create(
  params: Mapping[str, Any],
  optimizer: optax.GradientTransformation,
  *,
  mesh: jax.sharding.Mesh,
  reference: Mapping[str, Any] | None = None,
  offload: Offload = Offload(),
) -> TrainState:
  """Creates the state at step 0; moments are sharded as their parameters.

  Raises:
    errors.ConfigError: if a missing reference is offloaded, or the devices have
      no access to pinned host memory.
  """
  abstract = describe(
    params, optimizer, mesh=mesh, reference=reference, offload=offload
  )

  # `step` and `num_nonfinite` need separate buffers, since a step donates both.
  def zero() -> jax.Array:
    return jax.device_put(jnp.zeros((), jnp.int32), abstract.step.sharding)

  # Moments are zeros that do not depend on the parameters: without explicit
  # shardings they would all be placed on the first device.
  target = shardings(abstract)
  opt_state = jax.jit(optimizer.init, out_shardings=target.opt_state)(params)
  reference = jax.tree.map(jax.device_put, reference, target.reference)
  return TrainState(zero(), zero(), params, opt_state, reference)


def describe(
  params: Mapping[str, Any],
  optimizer: optax.GradientTransformation,
  *,
  mesh: jax.sharding.Mesh,
  reference: Mapping[str, Any] | None = None,
  offload: Offload = Offload(),
) -> TrainState:
  """Describes the state that `create` returns, without allocating it.

  `params` and `reference` may be arrays or `jax.ShapeDtypeStruct`s.

  Returns:
    The state with `jax.ShapeDtypeStruct`s with shardings as leaves.

  Raises:
    errors.ConfigError: see `create`.
  """
  if offload.reference and reference is None:
    raise errors.ConfigError(
      "offload.reference=True, but this run stores no reference.",
      where="--config.offload.reference=True",
      why="Without --config.loss.kl_coef no reference is used, and with "
      "adapters it is the base model.",
      fix="Set --config.offload.reference=False.",
    )
  if offload.optimizer or offload.reference:
    check_host_memory(mesh, where="--config.offload")
  replicated = sharding.replicated(mesh)
  zero: Any = jax.ShapeDtypeStruct(  # Any: stands for an array.
    (), jnp.int32, sharding=replicated
  )
  return TrainState(
    step=zero,
    num_nonfinite=zero,
    params=placed(params, shardings(params)),
    opt_state=placed(
      jax.eval_shape(optimizer.init, params),
      _moment_shardings(optimizer, params, replicated, offload.optimizer),
    ),
    reference=placed(
      reference,
      jax.tree.map(
        lambda leaf: _with_memory(leaf, offload.reference), reference
      ),
    ),
  )


def copied(params: Any, dtype: str) -> Any:  # Any: pytrees of one structure.
  """Copies parameters, cast to `dtype` unless it is empty."""
  return jax.tree.map(
    lambda x: jnp.array(x, dtype=dtype or x.dtype, copy=True), params
  )


def placed(tree: Any, places: Any) -> Any:  # Any: pytrees of one structure.
  """Returns `jax.ShapeDtypeStruct`s of the leaves, with the given shardings."""
  return jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=place
    ),
    tree,
    places,
  )


def shardings(tree: Any) -> Any:  # Any: pytrees of one structure.
  """Returns the sharding of each array of a state, or of a part of it."""
  return jax.tree.map(lambda leaf: leaf.sharding, tree)


def on_device(tree: Any) -> Any:  # Any: pytrees of one structure.
  """Transfers arrays from host memory to device memory.

  Inside `jit`, arrays that are already in device memory cost nothing.
  """
  return jax.device_put(tree, jax.memory.Space.Device)


def check_host_memory(mesh: jax.sharding.Mesh, *, where: str) -> None:
  """Checks that the devices can access pinned host memory.

  Raises:
    errors.ConfigError: naming the setting `where`, if they cannot.
  """
  device = mesh.devices.flat[0]
  kinds = [memory.kind for memory in device.addressable_memories()]
  if _HOST not in kinds:
    raise errors.ConfigError(
      f"Offloading needs {_HOST} memory, which {device} does not have.",
      where=where,
      why=f"The memory kinds of {device} are {', '.join(kinds)}.",
      fix="Disable offloading, or shard the state over more devices.",
    )


def _moment_shardings(
  optimizer: optax.GradientTransformation,
  params: Mapping[str, Any],
  replicated: jax.sharding.Sharding,
  is_offloaded: bool,
) -> Any:  # Any: a tree like the optimizer's state.
  """Returns the shardings of the optimizer's state.

  A moment is sharded as its parameter, whose path is a suffix of the moment's
  path: `[1].mu["head"]["kernel"]` is a moment of `["head"]["kernel"]`.
  """
  by_name = {
    _dict_keys(path): param for path, param in jax.tree.leaves_with_path(params)
  }

  def sharding_of(path: Sequence[Any], moment: jax.ShapeDtypeStruct) -> Any:
    param = by_name.get(_dict_keys(path))
    # Adafactor's factored moments have their parameter's path, but its rows or
    # columns only.
    if param is None or param.shape != moment.shape:
      return replicated
    return _with_memory(param, is_offloaded)

  abstract = jax.eval_shape(optimizer.init, params)
  return jax.tree.map_with_path(sharding_of, abstract)


def _dict_keys(path: Sequence[Any]) -> tuple[Any, ...]:
  """Returns the dictionary keys at the end of a path, the last one first."""

  def is_key(entry: object) -> bool:
    return isinstance(entry, jax.tree_util.DictKey)

  return tuple(itertools.takewhile(is_key, reversed(path)))


def _with_memory(array: jax.Array, is_offloaded: bool) -> jax.sharding.Sharding:
  """Returns the array's sharding, in host memory if it is offloaded."""
  place = array.sharding
  return place.with_memory_kind(_HOST) if is_offloaded else place
