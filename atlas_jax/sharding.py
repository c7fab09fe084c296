# SPDX-License-Identifier: Apache-2.0
"""The device mesh, and where each parameter lives on it.

Rules are data: a pattern over a parameter's path, and the mesh axis of each of
its dimensions. The first pattern that matches decides.
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

# From the slowest links to the fastest.
AXES = ("data", "fsdp", "expert", "context", "tensor")
# Devices along these see rows of their own.
ROWS = ("data", "fsdp", "expert")

_Axes: TypeAlias = str | tuple[str, ...] | None
# Along these, devices would hold the same weights: they hold a part each.
_SPLIT = ("fsdp", "expert", "context")
_EXPERT_SPLIT = ("fsdp", "context")

# What a kernel that is kept in few bits has of each input, or block of them.
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
  # One for all inputs of an output: only outputs can be split.
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
  # An adapter's long axis is split as the kernel's is; its rank is short.
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
  """Arranges devices in a mesh; one size may be -1, for what remains.

  Where devices come in slices with slow links between (TPU slices, GPU nodes),
  the first axes of `AXES` are the ones that cross them.

  Args:
    data: replicas that see different rows.
    fsdp: devices that share one copy of the parameters, and see different rows.
    tensor: devices that share each row's matrix products.
    context: devices that share each row's tokens. They hold a part of the
      parameters each, as along `fsdp`; keys and values are gathered in every
      layer.
    expert: devices that share the experts of a mixture. They see different
      rows, and share the other parameters as along `fsdp`.
    devices: to use; all there are if None.

  Raises:
    errors.ConfigError: if the sizes do not multiply to the devices there are.
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
  """Tells the size of every axis of a mesh, as `make_mesh` is asked for it.

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
      f"Mesh {found} does not cover the devices.",
      where="--config.mesh",
      why=f"There are {num_devices} devices; sizes multiply to {known}.",
      fix="Set one axis to -1 to fill what is left, "
      "e.g. --config.mesh.fsdp=-1.",
    )
  return found


def arrange(
  shape: Sequence[int],
  devices: Sequence[Any],  # Any: as in `make_mesh`.
  num_slices: int,
) -> np.ndarray:
  """Lays devices of several slices out, so that few axes leave a slice.

  Each axis, the outermost first, takes as many slices as divide it.
  """
  outer = []
  for size in shape:
    outer.append(math.gcd(size, num_slices // math.prod(outer)))
  inner = [size // count for size, count in zip(shape, outer, strict=True)]
  return mesh_utils.create_hybrid_device_mesh(inner, outer, devices)


def of_params(
  mesh: js.Mesh | js.AbstractMesh, abstract_params: Mapping[str, Any]
) -> Any:
  """Gives each parameter its sharding.

  Args:
    mesh: as made by `make_mesh`.
    abstract_params: nested dict with anything that has a `shape` as leaves.

  Returns:
    The same tree of `NamedSharding`.  # Any: mirrors the tree.

  Raises:
    errors.ConfigError: if a parameter's axis does not divide; names the flag.
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
  """Rows spread over the axes that see different rows."""
  return js.NamedSharding(mesh, js.PartitionSpec(ROWS))


def of_activations(mesh: js.Mesh | js.AbstractMesh) -> js.NamedSharding:
  """Rows spread as in a batch, and the tokens of each over `context`."""
  return js.NamedSharding(mesh, js.PartitionSpec(ROWS, "context"))


def replicated(mesh: js.Mesh) -> js.NamedSharding:
  """The same values on every device."""
  return js.NamedSharding(mesh, js.PartitionSpec())


def put(tree: Any, place: js.Sharding) -> Any:  # Any: a tree of NumPy arrays.
  """Lays arrays out that every process has whole, without asking the others.

  `jax.device_put` would have all processes compare what they have.
  """

  def put_one(array: np.ndarray) -> jax.Array:
    return jax.make_array_from_callback(
      array.shape, place, lambda index: array[index]
    )

  return jax.tree.map(put_one, tree)


def num_row_shards(mesh: js.Mesh | js.AbstractMesh) -> int:
  """Counts the parts that rows are spread in."""
  return math.prod(mesh.shape[axis] for axis in ROWS)


def share_of_rows(mesh: js.Mesh) -> tuple[int, int]:
  """Tells which of how many equal parts of a batch this process's devices see.

  Raises:
    errors.ConfigError: if they see rows that are not next to each other.
  """
  count = num_row_shards(mesh)
  places = of_batch(mesh).addressable_devices_indices_map((count,)).values()
  mine = sorted({place[0].indices(count)[0] for place in places if place})
  first, size = mine[0], len(mine)
  if mine[-1] != first + size - 1 or first % size or count % size:
    raise errors.ConfigError(
      "The mesh gives a process rows that lie apart.",
      where=f"--config.mesh, process {jax.process_index()}",
      why=f"Of {count} parts of a batch its devices see {mine}.",
      fix="Make the sizes of data and fsdp powers of two.",
    )
  return first // size, count // size


def check_length(
  mesh: js.Mesh | js.AbstractMesh, length: int, *, where: str
) -> None:
  """Refuses rows whose tokens cannot be spread evenly; `where` set the length.

  Raises:
    errors.ConfigError: see above.
  """
  context = mesh.shape["context"]
  if length % context:
    raise errors.ConfigError(
      f"A row of {length} tokens does not divide over the mesh.",
      where=f"{where}, --config.mesh.context={context}",
      why="Each device along context takes the same number of tokens.",
      fix=f"Set --config.mesh.context to {math.gcd(length, context)}, or the "
      f"length to {math.ceil(length / context) * context}.",
    )


def num_microbatches(
  mesh: js.Mesh | js.AbstractMesh, *, size: int, per_device: int
) -> int:
  """Tells in how many parts a batch goes through the devices.

  Args:
    mesh: as made by `make_mesh`. The devices along `ROWS` see different rows.
    size: rows of a batch.
    per_device: rows that a device sees at once; 0 for all it has.

  Raises:
    errors.ConfigError: if the rows cannot be spread evenly.
  """
  num_shards, axes = num_row_shards(mesh), " x ".join(ROWS)
  if size < 1 or size % num_shards:
    raise errors.ConfigError(
      f"A batch of {size} rows does not divide over the mesh.",
      where=f"--config.batch.size={size}",
      why=f"{axes} is {num_shards} devices, each takes the same number.",
      fix=f"Set it to a multiple of {num_shards}, or choose a smaller mesh.",
    )
  rows = size // num_shards
  if per_device < 0 or rows % (per_device or rows):
    raise errors.ConfigError(
      f"A device's {rows} rows of a batch do not divide by {per_device}.",
      where=f"--config.batch.per_device={per_device}",
      why=f"A batch has {size} rows, for {num_shards} devices along {axes}; "
      "each goes through them in parts of the same size.",
      fix=f"Set it to a divisor of {rows}, or to 0 for all at once.",
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
        why=f"Its dimension {i}, of size {size}, is split over {product}: "
        f"{total} devices.",
        fix=f"Make {product} a divisor of {size}; "
        f"{math.gcd(size, total)} is one. --config.mesh.data takes the rest.",
      )
