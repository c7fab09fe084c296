# SPDX-License-Identifier: Apache-2.0
"""Rotary position embeddings and their scaling to long contexts.

Source: Su et al., arXiv:2104.09864.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Cosines and sines of the angles, float32[B, T, 1, width / 2] each.
Turns = tuple[jax.Array, jax.Array]

_BETA_FAST, _BETA_SLOW = 32.0, 1.0  # Peng et al., section 3.2.


@dataclasses.dataclass(frozen=True)
class Linear:
  """Divides every position, and so every frequency, by `factor`."""

  factor: float


@dataclasses.dataclass(frozen=True)
class Llama3:
  """Divides low frequencies by `factor` and keeps high ones.

  With L the original context length, wavelengths above L / low_freq_factor are
  scaled, those below L / high_freq_factor are kept, and those in between are
  interpolated.

  Source: Llama 3.1's reference code.
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position_embeddings: float

  def __post_init__(self) -> None:
    """Validates that the interpolated band is not empty."""
    if self.high_freq_factor <= self.low_freq_factor:
      raise ValueError(
        f"high_freq_factor must exceed low_freq_factor={self.low_freq_factor}, "
        f"got {self.high_freq_factor}"
      )


@dataclasses.dataclass(frozen=True)
class Yarn:
  """Divides frequencies by `factor` where they are low.

  Pairs with fewer than `beta_slow` rotations in the original context are
  scaled, those with more than `beta_fast` are kept, and a linear ramp over the
  pair index interpolates in between. Queries and keys are multiplied by
  `attention_factor`.

  Source: Peng et al., arXiv:2309.00071, sections 3.2 and 3.4.
  """

  factor: float
  original_max_position_embeddings: float
  attention_factor: float | None = None
  beta_fast: float = _BETA_FAST
  beta_slow: float = _BETA_SLOW

  @property
  def amplitude(self) -> float:
    """Factor of queries and keys; defaults to 0.1 ln(factor) + 1."""
    if self.attention_factor is not None:
      return self.attention_factor
    return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1.0 else 1.0


_SCALINGS = {"linear": Linear, "llama3": Llama3, "yarn": Yarn}


@dataclasses.dataclass(frozen=True)
class Rope:
  """RoPE over the first `width` elements of each head; scales frequencies."""

  theta: float
  width: int
  scaling: Linear | Llama3 | Yarn | None

  def __post_init__(self) -> None:
    """Validates the width."""
    if self.width % 2:
      raise ValueError(
        f"RoPE rotates pairs: width must be even, got {self.width}"
      )

  def frequencies(self) -> np.ndarray:
    """Computes the angle per position of each pair, float32[width / 2].

    Pair i has theta^(-2 i / width) without scaling, and otherwise, with `share`
    in [0, 1] depending on the pair:

      share theta^(-2 i / width) + (1 - share) theta^(-2 i / width) / factor
    """
    exponent = np.arange(0, self.width, 2) / self.width
    kept = 1.0 / self.theta**exponent
    scaling = self.scaling
    if scaling is None:
      return kept.astype(np.float32)
    stretched = kept / scaling.factor
    if isinstance(scaling, Linear):
      share = np.zeros_like(kept)
    elif isinstance(scaling, Llama3):
      turns = scaling.original_max_position_embeddings * kept / (2.0 * np.pi)
      low, high = scaling.low_freq_factor, scaling.high_freq_factor
      share = (turns - low) / (high - low)
    else:
      first, last = (
        self._pair_that_turns(times, scaling.original_max_position_embeddings)
        for times in (scaling.beta_fast, scaling.beta_slow)
      )
      first = max(math.floor(first), 0)
      last = min(math.ceil(last), self.width - 1)
      ramp = np.arange(self.width // 2) - first
      share = 1.0 - ramp / max(last - first, 1e-3)
    share = np.clip(share, 0.0, 1.0)
    return ((1.0 - share) * stretched + share * kept).astype(np.float32)

  def _pair_that_turns(self, times: float, context: float) -> float:
    """Returns the i with context * theta^(-2 i / width) = 2 pi times."""
    ratio = math.log(context / (2.0 * math.pi * times))
    return self.width * ratio / (2.0 * math.log(self.theta))

  def turns(self, positions_BT: jax.Array) -> Turns:
    """Computes the scaled cosine and sine of every pair at every position."""
    angles = positions_BT[..., None, None].astype(jnp.float32)
    angles = angles * self.frequencies()
    amplitude = (
      self.scaling.amplitude if isinstance(self.scaling, Yarn) else 1.0
    )
    return amplitude * jnp.cos(angles), amplitude * jnp.sin(angles)


def rotate(x_BTNH: jax.Array, turns: Turns) -> jax.Array:
  """Rotates pairs (x_i, x_j), j = i + width / 2, by the angle a of a position.

    x_i -> x_i cos a - x_j sin a
    x_j -> x_j cos a + x_i sin a

  Elements of the head from `width` on are returned unchanged.
  """
  cos, sin = turns
  width = 2 * cos.shape[-1]
  turned, kept = x_BTNH[..., :width], x_BTNH[..., width:]
  first, second = jnp.split(turned.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return jnp.concatenate([turned.astype(x_BTNH.dtype), kept], axis=-1)


def from_hf(fields: Mapping[str, Any], *, head_width: int) -> Rope:
  """Builds a `Rope` from Hugging Face fields.

  Args:
    fields: parsed JSON of `rope_parameters`, or of the older fields merged into
      one: `rope_theta`, `partial_rotary_factor`, `rope_type` (older: `type`)
      and the parameters of the type.
    head_width: `partial_rotary_factor` is a fraction of it.

  Raises:
    ValueError: if a field is unknown, missing or not a positive number.
  """
  rest = {key: value for key, value in fields.items() if value is not None}
  kind = rest.pop("type", "default")
  kind = rest.pop("rope_type", kind)
  # YaRN's boundaries are always truncated to integers here.
  if rest.get("truncate") is True:
    del rest["truncate"]
  for name, value in rest.items():
    if type(value) not in (int, float) or not 0 < value < math.inf:
      raise ValueError(f"rope field {name} must be positive, got {value!r}")
  theta = float(rest.pop("rope_theta"))
  width = int(head_width * rest.pop("partial_rotary_factor", 1.0))
  if kind == "default":
    if rest:
      raise ValueError(f"unknown rope fields {sorted(rest)}")
    return Rope(theta, width, None)
  if not isinstance(kind, str) or kind not in _SCALINGS:
    raise ValueError(
      f"rope_type must be one of {sorted(_SCALINGS)}, got {kind!r}"
    )
  expected = dataclasses.fields(_SCALINGS[kind])
  if unknown := rest.keys() - {field.name for field in expected}:
    raise ValueError(f"unknown rope fields {sorted(unknown)} of {kind!r}")
  for field in expected:
    if field.default is dataclasses.MISSING and field.name not in rest:
      raise ValueError(f"rope field {field.name!r} is missing")
  return Rope(theta, width, _SCALINGS[kind](**rest))
