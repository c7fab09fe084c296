# SPDX-License-Identifier: Apache-2.0
"""The device mesh, and where each parameter lives on it.

Rules are data: a pattern over a parameter's path, and the mesh axis of each of
its dimensions. The first pattern that matches decides.
"""

from collections.abc import Mapping
import math
import re
from typing import Any

import jax
import jax.sharding as js

from atlas_jax import errors

AXES = ("data", "fsdp", "tensor")

# Stacked layers have a leading axis, which is never sharded.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (r"embed/embedding", ("tensor", "fsdp")),
  (r"head/kernel", ("fsdp", "tensor")),
  (r"layers/attention/[qkv]/kernel", (None, "fsdp", "tensor", None)),
  (r"layers/attention/[qkv]/bias", (None, "tensor", None)),
  (r"layers/attention/o/kernel", (None, "tensor", None, "fsdp")),
  (r"layers/attention/o/bias", (None, "fsdp")),
  (r"layers/mixture/router/kernel", (None, "fsdp", None)),
  (r"layers/mixture/(gate|up)", (None, None, "fsdp", "tensor")),
  (r"layers/mixture/down", (None, None, "tensor", "fsdp")),
  (r"layers/mlp/(gate|up)/kernel", (None, "fsdp", "tensor")),
  (r"layers/mlp/down/kernel", (None, "tensor", "fsdp")),
  # An adapter's long axis is split as the kernel's is; its rank is short.
  (r"layers/(attention/[qkv]|mlp/(gate|up))/lora_a", (None, "fsdp")),
  (r"layers/(attention/o|mlp/down)/lora_a", (None, "tensor")),
  (r"layers/(attention/[qkv]|mlp/(gate|up))/lora_b", (None, None, "tensor")),
  (r"layers/(attention/o|mlp/down)/lora_b", (None, None, "fsdp")),
  (r".*scale", ()),
)
# What each axis of a kernel counts, for messages only.
_BATCH_AXES = ("data", "fsdp")


def make_mesh(*, data: int, fsdp: int, tensor: int) -> js.Mesh:
  """Arranges all devices in a mesh of the three axes.

  Args:
    data: replicas that see different rows.
    fsdp: devices that share one copy of the parameters, and see different rows.
    tensor: devices that share each row's matrix products.

  Returns:
    The mesh. One size may be -1 and is then what remains.

  Raises:
    errors.ConfigError: if the sizes do not multiply to the devices there are.
  """
  sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
  num_devices = jax.device_count()
  free = [name for name, size in sizes.items() if size == -1]
  known = math.prod(size for size in sizes.values() if size != -1)
  valid = all(size == -1 or size > 0 for size in sizes.values())
  if valid and len(free) == 1 and num_devices % known == 0:
    sizes[free[0]] = num_devices // known
  if not valid or math.prod(sizes.values()) != num_devices:
    raise errors.ConfigError(
      f"Mesh {sizes} does not cover the devices.",
      where="--config.mesh",
      why=f"JAX sees {num_devices} devices; sizes multiply to {known}.",
      fix="Set one axis to -1 to fill what is left, "
      "e.g. --config.mesh.fsdp=-1.",
    )
  auto = (js.AxisType.Auto,) * len(AXES)
  return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=auto)


def of_params(mesh: js.Mesh, abstract_params: Mapping[str, Any]) -> Any:
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


def of_batch(mesh: js.Mesh) -> js.NamedSharding:
  """Rows spread over the axes that see different rows."""
  return js.NamedSharding(mesh, js.PartitionSpec(_BATCH_AXES))


def replicated(mesh: js.Mesh) -> js.NamedSharding:
  """The same values on every device."""
  return js.NamedSharding(mesh, js.PartitionSpec())


def num_microbatches(mesh: js.Mesh, *, size: int, per_device: int) -> int:
  """Tells in how many parts a batch goes through the devices.

  Args:
    mesh: as made by `make_mesh`. The devices along its axes `data` and `fsdp`
      see different rows.
    size: rows of a batch.
    per_device: rows that a device sees at once; 0 for all it has.

  Raises:
    errors.ConfigError: if the rows cannot be spread evenly.
  """
  num_shards = math.prod(mesh.shape[axis] for axis in _BATCH_AXES)
  if size < 1 or size % num_shards:
    raise errors.ConfigError(
      f"A batch of {size} rows does not divide over the mesh.",
      where=f"--config.batch.size={size}",
      why=f"data x fsdp is {num_shards} devices, each takes the same number.",
      fix=f"Set it to a multiple of {num_shards}, or choose a smaller mesh.",
    )
  rows = size // num_shards
  if per_device < 0 or rows % (per_device or rows):
    raise errors.ConfigError(
      f"A device's {rows} rows of a batch do not divide by {per_device}.",
      where=f"--config.batch.per_device={per_device}",
      why=f"A batch has {size} rows, for {num_shards} devices along data x "
      "fsdp; each goes through them in parts of the same size.",
      fix=f"Set it to a divisor of {rows}, or to 0 for all at once.",
    )
  return rows // (per_device or rows)


def _check_divides(
  mesh: js.Mesh, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]
) -> None:
  for size, axis in zip(shape, axes, strict=False):
    if axis is not None and size % mesh.shape[axis]:
      raise errors.ConfigError(
        f"Parameter {name} of shape {shape} does not divide over the mesh.",
        where=f"--config.mesh.{axis}={mesh.shape[axis]}",
        why=f"Its axis of size {size} is sharded over {axis!r}.",
        fix=f"Set --config.mesh.{axis} to a divisor of {size}.",
      )
