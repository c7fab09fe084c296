# SPDX-License-Identifier: Apache-2.0
"""Means over the tokens that count.

Masked values may be anything, NaN included. With everything masked, the mean
and its gradient are 0.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

# The names of `Aggregate`, to validate configs.
AGGREGATES = ("token_mean", "sequence_mean", "constant_length")
Aggregate = Literal["token_mean", "sequence_mean", "constant_length"]


class Mean(NamedTuple):
  """A mean as `total` / `weight`, so that the means of parts can be added up.

  Attributes:
    total: sum of what is averaged, over the counted tokens or sequences.
    weight: number of counted tokens or sequences.
  """

  total: jax.Array
  weight: jax.Array

  @property
  def mean(self) -> jax.Array:
    """The mean; 0 if nothing is counted."""
    return self.total / jnp.maximum(self.weight, 1)


def over_tokens(x_BT: jax.Array, mask_BT: jax.Array) -> Mean:
  """Averages over all counted tokens."""
  total = jnp.sum(x_BT, where=mask_BT, dtype=jnp.float32)
  return Mean(total, jnp.sum(mask_BT))


def over_sequences(x_BT: jax.Array, mask_BT: jax.Array) -> Mean:
  """Averages over sequences each one's mean over counted tokens.

  Each row is one sequence; rows must not be packed. Rows without counted tokens
  are excluded from the mean.
  """
  total_B = jnp.sum(x_BT, axis=1, where=mask_BT, dtype=jnp.float32)
  num_tokens_B = jnp.sum(mask_BT, axis=1)
  means_B = total_B / jnp.maximum(num_tokens_B, 1)
  return Mean(jnp.sum(means_B), jnp.sum(num_tokens_B > 0))


def over(level: str) -> Callable[[jax.Array, jax.Array], Mean]:
  """Returns `over_tokens` for the level "token", else `over_sequences`."""
  return over_tokens if level == "token" else over_sequences


def token_mean(x_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
  """Computes the mean of `over_tokens`."""
  return over_tokens(x_BT, mask_BT).mean


def sequence_mean(x_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
  """Computes the mean of `over_sequences`."""
  return over_sequences(x_BT, mask_BT).mean


def constant_length(
  x_BT: jax.Array, mask_BT: jax.Array, *, length: int
) -> jax.Array:
  """Computes the mean over sequences of each one's sum / `length`.

  A token thus has the same weight in a long sequence as in a short one. Rows
  are as in `over_sequences`.

  Source: Liu et al., arXiv:2503.20783, section 3.2.
  """
  total = jnp.sum(x_BT, where=mask_BT, dtype=jnp.float32)
  num_sequences = jnp.sum(jnp.any(mask_BT, axis=1))
  return total / (length * jnp.maximum(num_sequences, 1))


def mean(
  x_BT: jax.Array, mask_BT: jax.Array, *, aggregate: Aggregate, length: int
) -> jax.Array:
  """Computes the mean named by `aggregate`.

  Only `constant_length` uses `length`.

  Raises:
    ValueError: if `aggregate` is unknown.
  """
  match aggregate:
    case "token_mean":
      return token_mean(x_BT, mask_BT)
    case "sequence_mean":
      return sequence_mean(x_BT, mask_BT)
    case "constant_length":
      return constant_length(x_BT, mask_BT, length=length)
  raise ValueError(f"aggregate must be one of {AGGREGATES}, got {aggregate!r}.")


def count(mask_BT: jax.Array, *, aggregate: Aggregate) -> jax.Array:
  """Counts what `mean` averages over: tokens, or sequences with any.

  The means of the parts of a batch, weighted by their counts, add up to the
  mean of the batch, however it is split.
  """
  if aggregate == "token_mean":
    return jnp.sum(mask_BT)
  return jnp.sum(jnp.any(mask_BT, axis=1))
