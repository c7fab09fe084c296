# SPDX-License-Identifier: Apache-2.0
"""The device mesh and the sharding of parameters and batches.

Each rule is a pattern of parameter paths and the mesh axes of each dimension.
The first matching rule applies.
"""

from collections.abc import Mapping, Sequence
import math
import re
from typing import Any, TypeAlias

import jax
from jax.experimental import mesh_utils
import jax.sharding as js
import numpy as np

from atlas_jax import errors

# Ordered from the slowest links to the fastest.
AXES = ("data", "fsdp", "expert", "context", "tensor")
# Rows of a batch are sharded over these axes.
ROWS = ("data", "fsdp", "expert")

_Axes: TypeAlias = str | tuple[str, ...] | None
# Parameters are sharded over these axes as in FSDP; devices along them would
# otherwise hold identical copies.
_SPLIT = ("fsdp", "expert", "context")
_EXPERT_SPLIT = ("fsdp", "context")

# Arrays of a quantized kernel that have the kernel's dimensions. Block scales
# have one entry per block of inputs.
_KEPT = "(/int8|/nf4|/block_scales)?"

# Stacked layers have a leading axis, which is never sharded.
RULES: tuple[tuple[str, tuple[_Axes, ...]], ...] = (
  (r"embed/embedding", ("tensor", _SPLIT)),
  (r"head/kernel", (_SPLIT, "tensor")),
  (rf"layers/attention/[qkv]/kernel{_KEPT}", (None, _SPLIT, "tensor", None)),
  (r"layers/attention/[qkv]/bias", (None, "tensor", None)),
  (rf"layers/attention/o/kernel{_KEPT}", (None, "tensor", None, _SPLIT)),
  (r"layers/attention/o/bias", (None, _SPLIT)),
  (r"layers/mixture/router/kernel", (None, _SPLIT, None)),
  (
    rf"layers/mixture/(gate|up){_KEPT}",
    (None, "expert", _EXPERT_SPLIT, "tensor"),
  ),
  (rf"layers/mixture/down{_KEPT}", (None, "expert", "tensor", _EXPERT_SPLIT)),
  (rf"layers/mlp/(gate|up)/kernel{_KEPT}", (None, _SPLIT, "tensor")),
  (rf"layers/mlp/down/kernel{_KEPT}", (None, "tensor", _SPLIT)),
  # Channel scales have size 1 along inputs, so only outputs can be sharded.
  (
    r"layers/attention/[qkv]/kernel/channel_scales",
    (None, None, "tensor", None),
  ),
  (r"layers/attention/o/kernel/channel_scales", (None, None, None, _SPLIT)),
  (
    r"layers/mixture/(gate|up)/channel_scales",
    (None, "expert", None, "tensor"),
  ),
  (
    r"layers/mixture/down/channel_scales",
    (None, "expert", None, _EXPERT_SPLIT),
  ),
  (r"layers/mlp/(gate|up)/kernel/channel_scales", (None, None, "tensor")),
  (r"layers/mlp/down/kernel/channel_scales", (None, None, _SPLIT)),
  # A LoRA matrix is sharded like its kernel along inputs or outputs; the rank
  # axis is small and not sharded.
  (r"layers/(attention/[qkv]|mlp/(gate|up))/lora_a", (None, _SPLIT)),
  (r"layers/(attention/o|mlp/down)/lora_a", (None, "tensor")),
  (r"layers/(attention/[qkv]|mlp/(gate|up))/lora_b", (None, None, "tensor")),
  (r"layers/(attention/o|mlp/down)/lora_b", (None, None, _SPLIT)),
  (r".*scale", ()),
)


def make_mesh(
  *,
  data: int,
  fsdp: int,
  tensor: int,
  context: int = 1,
  expert: int = 1,
  devices: Sequence[Any] | None = None,  # Any: JAX names no type for them.
) -> js.Mesh:
  """Creates a device mesh; one size may be -1 to use all remaining devices.

  If devices are in slices with slow links between them (TPU slices, GPU nodes),
  the first axes of `AXES` cross the slices.

  Args:
    data: number of replicas; each sees different rows.
    fsdp: size of the axis that shards parameters and rows.
    tensor: size of the axis that shards the matrix products of each row.
    context: size of the axis that shards the tokens of each row. Parameters are
      sharded as along `fsdp`; keys and values are gathered in every layer.
    expert: size of the axis that shards the experts of a mixture. Rows and
      other parameters are sharded as along `fsdp`.
    devices: devices of the mesh; None for all.

  Raises:
    errors.ConfigError: if the product of the sizes is not the number of
      devices.
  """
  devices = jax.devices() if devices is None else devices
  found = sizes(
    len(devices),
    data=data,
    fsdp=fsdp,
    tensor=tensor,
    context=context,
    expert=expert,
  )
  shape, auto = tuple(found.values()), (js.AxisType.Auto,) * len(AXES)
  num_slices = len({getattr(device, "slice_index", 0) for device in devices})
  if num_slices == 1:
    return jax.make_mesh(shape, AXES, axis_types=auto, devices=devices)
  return js.Mesh(arrange(shape, devices, num_slices), AXES, axis_types=auto)


def sizes(num_devices: int, **asked: int) -> dict[str, int]:
  """Returns the size of every mesh axis; `asked` are arguments of `make_mesh`.

  Raises:
    errors.ConfigError: see `make_mesh`.
  """
  found = {axis: asked.get(axis, 1) for axis in AXES}
  free = [axis for axis, size in found.items() if size == -1]
  known = math.prod(size for size in found.values() if size != -1)
  valid = all(size == -1 or size > 0 for size in found.values())
  if valid and len(free) == 1 and num_devices % known == 0:
    found[free[0]] = num_devices // known
  if not valid or math.prod(found.values()) != num_devices:
    raise errors.ConfigError(
      f"Mesh {found} does not match {num_devices} devices.",
      where="--config.mesh",
      why=f"The product of the given sizes is {known}; sizes must be > 0, or "
      "-1 for at most one axis.",
      fix="Set one axis to -1 to use all remaining devices, e.g. "
      "--config.mesh.fsdp=-1.",
    )
  return found


def arrange(
  shape: Sequence[int],
  devices: Sequence[Any],  # Any: as in `make_mesh`.
  num_slices: int,
) -> np.ndarray:
  """Arranges devices of several slices so that few mesh axes cross slices.

  Axis i, outermost first, spans gcd(shape[i], number of slices left) slices.
  """
  outer = []
  for size in shape:
    outer.append(math.gcd(size, num_slices // math.prod(outer)))
  inner = [size // count for size, count in zip(shape, outer, strict=True)]
  return mesh_utils.create_hybrid_device_mesh(inner, outer, devices)


def of_params(
  mesh: js.Mesh | js.AbstractMesh, abstract_params: Mapping[str, Any]
) -> Any:
  """Returns the sharding of each parameter.

  Args:
    mesh: created by `make_mesh`.
    abstract_params: nested dict whose leaves have a `shape`.

  Returns:
    The same tree with `NamedSharding` leaves.  # Any: mirrors the tree.

  Raises:
    errors.ConfigError: if a dimension is not divisible by its mesh axes.
  """

  def rule(path: tuple[Any, ...], leaf: Any) -> js.NamedSharding:
    name = "/".join(str(key.key) for key in path)
    for pattern, axes in RULES:
      if re.fullmatch(pattern, name):
        _check_divides(mesh, name, leaf.shape, axes)
        return js.NamedSharding(mesh, js.PartitionSpec(*axes))
    raise ValueError(f"No sharding rule matches parameter {name!r}.")

  return jax.tree_util.tree_map_with_path(rule, abstract_params)


def of_batch(mesh: js.Mesh | js.AbstractMesh) -> js.NamedSharding:
  """Returns a sharding of rows over `ROWS`."""
  return js.NamedSharding(mesh, js.PartitionSpec(ROWS))


def of_activations(mesh: js.Mesh | js.AbstractMesh) -> js.NamedSharding:
  """Returns a sharding of rows over `ROWS` and of tokens over `context`."""
  return js.NamedSharding(mesh, js.PartitionSpec(ROWS, "context"))


def replicated(mesh: js.Mesh) -> js.NamedSharding:
  """Returns a sharding with the same values on every device."""
  return js.NamedSharding(mesh, js.PartitionSpec())


def put(tree: Any, place: js.Sharding) -> Any:  # Any: a tree of NumPy arrays.
  """Shards arrays that every process holds in full, without communication.

  `jax.device_put` would compare the values of all processes.
  """

  def put_one(array: np.ndarray) -> jax.Array:
    return jax.make_array_from_callback(
      array.shape, place, lambda index: array[index]
    )

  return jax.tree.map(put_one, tree)


def num_row_shards(mesh: js.Mesh | js.AbstractMesh) -> int:
  """Returns the number of shards that rows are split into."""
  return math.prod(mesh.shape[axis] for axis in ROWS)


def share_of_rows(mesh: js.Mesh) -> tuple[int, int]:
  """Returns (index, count) of the equal part of a batch for this process.

  Raises:
    errors.ConfigError: if the rows of this process's devices are not
      contiguous.
  """
  count = num_row_shards(mesh)
  places = of_batch(mesh).addressable_devices_indices_map((count,)).values()
  mine = sorted({place[0].indices(count)[0] for place in places if place})
  first, size = mine[0], len(mine)
  if mine[-1] != first + size - 1 or first % size or count % size:
    raise errors.ConfigError(
      "Each process must hold contiguous rows of a batch.",
      where=f"--config.mesh, process {jax.process_index()}",
      why=f"Of {count} row shards, this process's devices hold {mine}.",
      fix="Set data and fsdp to powers of two.",
    )
  return first // size, count // size


def check_length(
  mesh: js.Mesh | js.AbstractMesh, length: int, *, where: str
) -> None:
  """Validates that `length` tokens can be sharded evenly over `context`.

  Args:
    mesh: created by `make_mesh`.
    length: tokens of a row.
    where: the flag that sets the length, for the error.

  Raises:
    errors.ConfigError: if `length` is not a multiple of the axis size.
  """
  context = mesh.shape["context"]
  if length % context:
    raise errors.ConfigError(
      f"Row length must be a multiple of mesh.context={context}, got {length} "
      "tokens.",
      where=f"{where}, --config.mesh.context={context}",
      why="Each device along context holds the same number of tokens.",
      fix=f"Set --config.mesh.context to {math.gcd(length, context)}, or the "
      f"length to {math.ceil(length / context) * context}.",
    )


def num_microbatches(
  mesh: js.Mesh | js.AbstractMesh, *, size: int, per_device: int
) -> int:
  """Returns the number of microbatches of a batch.

  Args:
    mesh: created by `make_mesh`.
    size: rows of a batch.
    per_device: rows per device in a microbatch; 0 for all of its rows.

  Raises:
    errors.ConfigError: if the rows cannot be divided evenly.
  """
  num_shards, axes = num_row_shards(mesh), " x ".join(ROWS)
  if size < 1 or size % num_shards:
    raise errors.ConfigError(
      f"batch.size must be a positive multiple of {num_shards}, got {size}.",
      where=f"--config.batch.size={size}",
      why=f"Rows are sharded evenly over {axes} = {num_shards} devices.",
      fix=f"Set it to a multiple of {num_shards}, or choose a smaller mesh.",
    )
  rows = size // num_shards
  if per_device < 0 or rows % (per_device or rows):
    raise errors.ConfigError(
      f"batch.per_device must be 0 or a divisor of {rows}, got {per_device}.",
      where=f"--config.batch.per_device={per_device}",
      why=f"Each of {num_shards} devices along {axes} has {rows} of {size} "
      "rows, in microbatches of equal size.",
      fix=f"Set it to a divisor of {rows}, or to 0 for a single microbatch.",
    )
  return rows // (per_device or rows)


def _check_divides(
  mesh: js.Mesh | js.AbstractMesh,
  name: str,
  shape: tuple[int, ...],
  axes: tuple[_Axes, ...],
) -> None:
  for i, (size, over) in enumerate(zip(shape, axes, strict=False)):
    split = {
      axis: mesh.shape[axis]
      for axis in ((over,) if isinstance(over, str) else over or ())
      if mesh.shape[axis] > 1
    }
    total = math.prod(split.values())
    if size % total:
      product = " x ".join(split)
      raise errors.ConfigError(
        f"Parameter {name} of shape {shape} does not divide over the mesh.",
        where=" ".join(f"--config.mesh.{k}={v}" for k, v in split.items()),
        why=f"Dimension {i}, of size {size}, is sharded over {product}: "
        f"{total} devices.",
        fix=f"Set {product} to a divisor of {size}, e.g. "
        f"{math.gcd(size, total)}, and use the remaining devices for "
        "--config.mesh.data.",
      )
