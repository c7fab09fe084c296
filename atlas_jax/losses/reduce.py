# SPDX-License-Identifier: Apache-2.0
"""Means over the tokens that count.

What the mask hides may be anything, NaN included; where it hides everything,
the mean and its gradient are 0.
"""

from typing import Literal

import jax
import jax.numpy as jnp

# Written out for the check of what a config names.
AGGREGATES = ("token_mean", "sequence_mean", "constant_length")
Aggregate = Literal["token_mean", "sequence_mean", "constant_length"]


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


def constant_length(
  x_BT: jax.Array, mask_BT: jax.Array, *, length: int
) -> jax.Array:
  """Averages over sequences the sum over each one's counted tokens / length.

  So a token weighs the same in a long sequence as in a short one, whatever else
  is in the batch. Rows as in `sequence_mean`.

  Source: Liu et al., arXiv:2503.20783, section 3.2.
  """
  total = jnp.sum(x_BT, where=mask_BT, dtype=jnp.float32)
  num_sequences = jnp.sum(jnp.any(mask_BT, axis=1))
  return total / (length * jnp.maximum(num_sequences, 1))


def mean(
  x_BT: jax.Array, mask_BT: jax.Array, *, aggregate: Aggregate, length: int
) -> jax.Array:
  """Averages by the named one of the three.

  `length` is what `constant_length` divides by; the others have their own.

  Raises:
    ValueError: if there is none of that name.
  """
  match aggregate:
    case "token_mean":
      return token_mean(x_BT, mask_BT)
    case "sequence_mean":
      return sequence_mean(x_BT, mask_BT)
    case "constant_length":
      return constant_length(x_BT, mask_BT, length=length)
  raise ValueError(
    f"Unknown aggregate {aggregate!r}; expected one of {AGGREGATES}."
  )


def count(mask_BT: jax.Array, *, aggregate: Aggregate) -> jax.Array:
  """Counts what `mean` is over: tokens, or sequences with any.

  Means of parts of a batch, weighed by their counts, add up to the mean of the
  whole: however it is split.
  """
  if aggregate == "token_mean":
    return jnp.sum(mask_BT)
  return jnp.sum(jnp.any(mask_BT, axis=1))
