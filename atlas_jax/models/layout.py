# SPDX-License-Identifier: Apache-2.0
"""Where activations lie on a mesh: hints for the compiler, which move no value.

A layout is the sharding of arrays [B, T, ...]: the mesh axes of their rows, and
that of their tokens. Without one the compiler decides by itself.
"""

import jax
import jax.sharding as js

Layout = js.NamedSharding


def spread(x_BTD: jax.Array, layout: Layout | None) -> jax.Array:
  """Lays rows and tokens out, and nothing else of an array."""
  if layout is None:
    return x_BTD
  return jax.lax.with_sharding_constraint(x_BTD, layout)


def gather_tokens(x_BTKH: jax.Array, layout: Layout | None) -> jax.Array:
  """Gives every device all tokens of its rows, of the heads that it has.

  It costs one all-gather, and on the way back one reduce-scatter, of an array
  of the rows' keys or values.
  """
  if layout is None:
    return x_BTKH
  free = js.PartitionSpec.UNCONSTRAINED
  spec = js.PartitionSpec(layout.spec[0], None, free, None)
  return jax.lax.with_sharding_constraint(
    x_BTKH, js.NamedSharding(layout.mesh, spec)
  )


def splits_tokens(layout: Layout | None) -> bool:
  """Tells whether devices have tokens of one row between them."""
  return layout is not None and layout.mesh.shape[layout.spec[1]] > 1


def divides(x_BTD: jax.Array, layout: Layout) -> bool:
  """Tells whether each device gets as many rows and tokens as any other."""
  sizes = dict(layout.mesh.shape)
  rows, tokens = layout.spec
  num_parts = 1
  for axis in rows:
    num_parts *= sizes[axis]
  return not (x_BTD.shape[0] % num_parts or x_BTD.shape[1] % sizes[tokens])
