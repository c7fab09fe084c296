# SPDX-License-Identifier: Apache-2.0
"""Sharding constraints for activations; they change no values.

A layout is the sharding of arrays [B, T, ...]: mesh axes of the rows, and the
mesh axis of the tokens. Without a layout, the compiler decides.
"""

import jax
import jax.sharding as js

Layout = js.NamedSharding


def spread(x_BTD: jax.Array, layout: Layout | None) -> jax.Array:
  """Shards rows and tokens; all other axes are replicated."""
  if layout is None:
    return x_BTD
  return jax.lax.with_sharding_constraint(x_BTD, layout)


def gather_tokens(x_BTKH: jax.Array, layout: Layout | None) -> jax.Array:
  """Replicates tokens; rows stay sharded, the compiler decides on heads.

  Costs one all-gather, and one reduce-scatter in the backward pass, of an array
  of keys or values.
  """
  if layout is None:
    return x_BTKH
  free = js.PartitionSpec.UNCONSTRAINED
  spec = js.PartitionSpec(layout.spec[0], None, free, None)
  return jax.lax.with_sharding_constraint(
    x_BTKH, js.NamedSharding(layout.mesh, spec)
  )


def splits_tokens(layout: Layout | None) -> bool:
  """Returns whether the tokens of one row are split over devices."""
  return layout is not None and layout.mesh.shape[layout.spec[1]] > 1


def divides(x_BTD: jax.Array, layout: Layout) -> bool:
  """Returns whether rows and tokens divide evenly over the mesh."""
  sizes = dict(layout.mesh.shape)
  rows, tokens = layout.spec
  num_parts = 1
  for axis in rows:
    num_parts *= sizes[axis]
  return not (x_BTD.shape[0] % num_parts or x_BTD.shape[1] % sizes[tokens])
