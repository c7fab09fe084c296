# SPDX-License-Identifier: Apache-2.0
"""Rotary positions: their frequencies, and how they stretch to long contexts.

Source: Su et al., arXiv:2104.09864.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Cosines and sines, float32[B, T, 1, H / 2] each.
Turns = tuple[jax.Array, jax.Array]

_BETA_FAST, _BETA_SLOW = 32.0, 1.0  # Peng et al., section 3.2.


@dataclasses.dataclass(frozen=True)
class Linear:
  """Every position counts as `1 / factor` of itself."""

  factor: float


@dataclasses.dataclass(frozen=True)
class Llama3:
  """Stretches long wavelengths by `factor`, and keeps short ones.

  Long is more than the original context divided by `low_freq_factor`, short
  less than it divided by `high_freq_factor`; those between are interpolated.

  Source: Llama 3.1's reference code.
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position_embeddings: float

  def __post_init__(self) -> None:
    """Refuses an empty band to interpolate in."""
    if self.high_freq_factor <= self.low_freq_factor:
      raise ValueError("high_freq_factor is not above low_freq_factor")


@dataclasses.dataclass(frozen=True)
class Yarn:
  """Stretches pairs that turn seldom in the original context.

  Pairs that turn less than `beta_slow` times in it are stretched by `factor`,
  those that turn more than `beta_fast` times are kept, and between them a ramp
  over the pairs mixes both. Queries and keys grow by `attention_factor`.

  Source: Peng et al., arXiv:2309.00071, sections 3.2 and 3.4.
  """

  factor: float
  original_max_position_embeddings: float
  attention_factor: float | None = None
  beta_fast: float = _BETA_FAST
  beta_slow: float = _BETA_SLOW

  @property
  def amplitude(self) -> float:
    """What multiplies queries and keys; 0.1 ln(factor) + 1 if not given."""
    if self.attention_factor is not None:
      return self.attention_factor
    return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1.0 else 1.0


_SCALINGS = {"linear": Linear, "llama3": Llama3, "yarn": Yarn}


@dataclasses.dataclass(frozen=True)
class Rope:
  """How heads are turned: the first `width` numbers of each, in pairs."""

  theta: float
  width: int
  scaling: Linear | Llama3 | Yarn | None

  def __post_init__(self) -> None:
    """Refuses odd widths."""
    if self.width % 2:
      raise ValueError(f"RoPE turns pairs, but {self.width} numbers of a head")

  def frequencies(self) -> np.ndarray:
    """Computes the angle per position of each pair, float32[width / 2]."""
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
    """Solves context * theta^(-2 i / width) = 2 pi times for i."""
    ratio = math.log(context / (2.0 * math.pi * times))
    return self.width * ratio / (2.0 * math.log(self.theta))

  def turns(self, positions_BT: jax.Array) -> Turns:
    """Computes the cosines and sines of every pair at every position."""
    angles = positions_BT[..., None, None].astype(jnp.float32)
    angles = angles * self.frequencies()
    amplitude = (
      self.scaling.amplitude if isinstance(self.scaling, Yarn) else 1.0
    )
    return amplitude * jnp.cos(angles), amplitude * jnp.sin(angles)


def rotate(x_BTNH: jax.Array, turns: Turns) -> jax.Array:
  """Turns pair (i, i + width / 2) of each head by its position's angle."""
  cos, sin = turns
  width = 2 * cos.shape[-1]
  turned, kept = x_BTNH[..., :width], x_BTNH[..., width:]
  first, second = jnp.split(turned.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return jnp.concatenate([turned.astype(x_BTNH.dtype), kept], axis=-1)


def from_hf(fields: Mapping[str, Any], *, head_width: int) -> Rope:
  """Reads the fields of `rope_parameters`, or of what came before it.

  Args:
    fields: parsed JSON: `rope_theta`, `partial_rotary_factor`, `rope_type`
      (older: `type`), and those of the type.
    head_width: of which `partial_rotary_factor` is turned.

  Raises:
    ValueError: if a field is unknown, missing or no positive number.
  """
  rest = {key: value for key, value in fields.items() if value is not None}
  kind = rest.pop("type", "default")
  kind = rest.pop("rope_type", kind)
  # Yarn's own way to round is the one there is.
  if rest.get("truncate") is True:
    del rest["truncate"]
  for name, value in rest.items():
    if type(value) not in (int, float) or not 0 < value < math.inf:
      raise ValueError(f"rope field {name}={value!r} is no positive number")
  theta = float(rest.pop("rope_theta"))
  width = int(head_width * rest.pop("partial_rotary_factor", 1.0))
  if kind == "default":
    if rest:
      raise ValueError(f"rope fields {sorted(rest)} are not known")
    return Rope(theta, width, None)
  if not isinstance(kind, str) or kind not in _SCALINGS:
    raise ValueError(f"rope_type={kind!r} is not one of {sorted(_SCALINGS)}")
  expected = dataclasses.fields(_SCALINGS[kind])
  if unknown := rest.keys() - {field.name for field in expected}:
    raise ValueError(f"rope fields {sorted(unknown)} are not known")
  for field in expected:
    if field.default is dataclasses.MISSING and field.name not in rest:
      raise ValueError(f"rope field {field.name!r} is missing")
  return Rope(theta, width, _SCALINGS[kind](**rest))
