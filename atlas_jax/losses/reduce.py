# SPDX-License-Identifier: Apache-2.0
"""Means over the tokens that count.

What the mask hides may be anything, NaN included; where it hides everything,
the mean and its gradient are 0.
"""

from typing import Literal

import jax
import jax.numpy as jnp

Aggregate = Literal["token_mean", "sequence_mean"]


def token_mean(x_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
  """Averages over all counted tokens, each weighing the same."""
  total = jnp.sum(x_BT, where=mask_BT, dtype=jnp.float32)
  return total / jnp.maximum(jnp.sum(mask_BT), 1)


def sequence_mean(x_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
  """Averages over sequences the mean over each one's counted tokens.

  A row is one sequence, so rows are not packed. A row without a counted token
  is left out: it adds nothing, and the others are not divided by it.
  """
  total_B = jnp.sum(x_BT, axis=1, where=mask_BT, dtype=jnp.float32)
  num_tokens_B = jnp.sum(mask_BT, axis=1)
  means_B = total_B / jnp.maximum(num_tokens_B, 1)
  return jnp.sum(means_B) / jnp.maximum(jnp.sum(num_tokens_B > 0), 1)


def mean(
  x_BT: jax.Array, mask_BT: jax.Array, *, aggregate: Aggregate
) -> jax.Array:
  """Averages by the named one of the two.

  Raises:
    ValueError: if there is none of that name.
  """
  means = {"token_mean": token_mean, "sequence_mean": sequence_mean}
  if aggregate not in means:
    raise ValueError(
      f"Unknown aggregate {aggregate!r}; expected one of {sorted(means)}."
    )
  return means[aggregate](x_BT, mask_BT)
