# SPDX-License-Identifier: Apache-2.0
"""Compares weights bit for bit, and models by their outputs."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
import pathlib
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.sharding as js
import numpy as np

from atlas_jax import errors
from atlas_jax.models import decoder
from conversion import load, shards, weights

_LAYER = re.compile(r"\blayers[./](\d+)[./]")
_ROWS = 4096  # Compared at a time, to avoid casting a whole tensor.
_PROMPT_TOKENS = 32


@dataclasses.dataclass(frozen=True)
class Difference:
  """How a tensor differs.

  `kind` names the difference. `num_values` is the number of differing values
  and `largest` their largest absolute difference, for equal shapes. The latter
  is zero only for values that differ in the bits of a NaN or a zero.
  """

  name: str
  kind: str
  num_values: int = 0
  largest: float = 0.0


def differences(
  left: weights.Weights,
  right: weights.Weights,
  progress: Callable[[int], None] = lambda _: None,
) -> list[Difference]:
  """Lists the tensors that are not equal bit for bit."""
  found = []
  for name in [*left, *(name for name in right if name not in left)]:
    if name not in left or name not in right:
      side = "left" if name in left else "right"
      found.append(Difference(name, f"only on the {side}"))
      continue
    difference = _difference(name, left[name], right[name])
    progress(math.prod(left[name].shape) * left[name].dtype.itemsize)
    if difference is not None:
      found.append(difference)
  return found


def _difference(
  name: str, left: weights.Weight, right: weights.Weight
) -> Difference | None:
  if left.shape != right.shape:
    return Difference(name, f"shape {left.shape} against {right.shape}")
  a, b = np.atleast_1d(left.read()), np.atleast_1d(right.read())
  count, largest = 0, 0.0
  for start in range(0, len(a), _ROWS):
    x, y = a[start : start + _ROWS], b[start : start + _ROWS]
    if left.dtype != right.dtype:
      x, y = x.astype(np.float32), y.astype(np.float32)
    differs = _bits(x) != _bits(y)
    if differs.any():
      count += int(differs.sum())
      x, y = x[differs].astype(np.float32), y[differs].astype(np.float32)
      with np.errstate(invalid="ignore"):  # Infinity minus infinity.
        largest = float(np.maximum(largest, np.abs(x - y).max()))
  if left.dtype != right.dtype:
    kind = f"{left.dtype.name} against {right.dtype.name}"
    return Difference(name, kind, count, largest)
  return Difference(name, "values", count, largest) if count else None


def _bits(array: np.ndarray) -> np.ndarray:
  return array.view(f"u{array.dtype.itemsize}")


def table(found: Sequence[Difference]) -> list[str]:
  """Returns the lines of a table: differences by layer, or by tensor."""
  groups: dict[str, list[Difference]] = {}
  for difference in found:
    match = _LAYER.search(difference.name)
    group = f"layer {match[1]}" if match else difference.name
    groups.setdefault(group, []).append(difference)
  lines = [f"{'tensors':>8} {'values':>14} {'max abs':>10}  where"]
  for group, members in groups.items():
    # np.max, unlike max, propagates NaNs.
    largest = np.max([member.largest for member in members])
    num_values = sum(member.num_values for member in members)
    kinds = ", ".join(sorted({member.kind for member in members}))
    lines.append(
      f"{len(members):>8} {num_values:>14,} {largest:>10.3g}  {group}: {kinds}"
    )
  return lines


def prompts(vocab_size: int) -> jax.Array:
  """Returns four prompts of token ids that depend only on the vocabulary size.

  They are the first ids, the last ids, evenly spaced ids, and scattered ids.
  """
  place = np.arange(_PROMPT_TOKENS)
  rows = [
    place,
    -1 - place,
    place * vocab_size // _PROMPT_TOKENS,
    7919 * (place + 1) ** 2,
  ]
  return jnp.asarray(np.stack(rows) % vocab_size, jnp.int32)


def _batch(model: decoder.Model) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns tokens, positions and segment ids of the prompts."""
  tokens_BT = prompts(model.config.vocab_size)
  place_T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
  positions_BT = jnp.broadcast_to(place_T, tokens_BT.shape)
  return tokens_BT, positions_BT, jnp.ones_like(tokens_BT)


class Gap(NamedTuple):
  """The distance between two arrays of logits or hidden states.

  `largest` is the largest absolute difference. `divergence` is
  KL(left || right) of the next-token distributions in nats, averaged over all
  tokens.
  """

  largest: float
  divergence: float


def logit_gap(
  left: tuple[decoder.Model, decoder.Params],
  right: tuple[decoder.Model, decoder.Params],
) -> Gap:
  """Compares the logits of `prompts`."""
  logits = [
    model.logits(params, *_batch(model)) for model, params in (left, right)
  ]
  return Gap(_gap(*logits), _divergence(*logits))


def compare_layers(
  left: tuple[decoder.Model, decoder.Params],
  right: tuple[decoder.Model, decoder.Params],
) -> str:
  """Returns a table of the differences of hidden states after each layer.

  The KL divergence is that of the logits when the final norm and the head are
  applied after that layer, so a wrong norm or head shows in every row.
  """
  states = [
    model.states(params, *_batch(model)) for model, params in (left, right)
  ]
  gaps = []
  for pair in zip(*states, strict=True):
    logits = [
      model.read_off(params, x_BTD)
      for (model, params), x_BTD in zip((left, right), pair, strict=True)
    ]
    gaps.append(Gap(_gap(*pair), _divergence(*logits)))
  names = ["the embedding", *(f"layer {i}" for i in range(len(gaps) - 1))]
  # Written as != so that a NaN counts as a difference.
  parted = [n for n, gap in zip(names, gaps, strict=True) if gap.largest != 0]
  first = f"differ first after {parted[0]}" if parted else "are equal"
  lines = [f"Hidden states {first}.", f"{'max abs':>10} {'KL':>10}  after"]
  lines += [
    f"{gap.largest:>10.3g} {gap.divergence:>10.3g}  {name}"
    for name, gap in zip(names, gaps, strict=True)
  ]
  return "\n    ".join(lines)


def _divergence(a_BTV: jax.Array, b_BTV: jax.Array) -> float:
  """Computes KL(a || b) of next-token distributions, averaged over all tokens.

  Clipped at zero, since rounding may make it negative for equal logits.
  """
  a_BTV, b_BTV = (
    jax.nn.log_softmax(x.astype(jnp.float32)) for x in (a_BTV, b_BTV)
  )
  kl_BT = jnp.sum(jnp.exp(a_BTV) * (a_BTV - b_BTV), axis=-1)
  return float(np.maximum(np.mean(_fetched(kl_BT)), 0.0))


def _gap(a: jax.Array, b: jax.Array) -> float:
  # In NumPy, since XLA's maximum on a CPU may drop a NaN.
  x, y = (_fetched(each.astype(jnp.float32)) for each in (a, b))
  return float(np.max(np.abs(x - y)))


def _fetched(array: jax.Array) -> np.ndarray:
  """Returns the values of an array, gathered if processes hold only parts."""
  place = array.sharding
  if not array.is_fully_addressable and isinstance(place, js.NamedSharding):
    everywhere = js.NamedSharding(place.mesh, js.PartitionSpec())
    array = jax.jit(lambda x: x, out_shardings=everywhere)(array)
  return np.asarray(array)


def config_differences(left: decoder.Model, right: decoder.Model) -> list[str]:
  """Lists the config fields in which the two models differ."""
  a: Mapping[str, object] = vars(left.config)
  b: Mapping[str, object] = vars(right.config)
  compared = [f.name for f in dataclasses.fields(left.config) if f.compare]
  return [
    f"{key}: {a[key]} and {b[key]}" for key in compared if a[key] != b[key]
  ]


def logits_equal(
  directory: pathlib.Path,
  params: decoder.Params,
  model: decoder.Model,
  *,
  tolerance: float,
) -> float:
  """Compares the logits of a written directory with those of live parameters.

  The live parameters are first rounded to the precision of the files, so only
  a wrong tensor can cause a difference.

  Args:
    directory: as written by `save.save`.
    params: what was written; the copy gets the same shardings.
    model: of the parameters.
    tolerance: the largest absolute difference allowed, over `prompts`.

  Returns:
    The largest absolute difference, in float32.

  Raises:
    errors.CheckpointError: if it exceeds the tolerance; names the layer.
  """
  written = next(iter(shards.open_directory(directory).values())).dtype
  rounded = jax.tree.map(lambda x: x.astype(written).astype(x.dtype), params)
  loaded = load.load(
    directory,
    model,
    param_dtype=jax.tree.leaves(params)[0].dtype.name,
    shardings=jax.tree.map(lambda x: x.sharding, params),
  )
  live, read = (model, rounded), (model, loaded)
  gap = logit_gap(live, read)
  if not gap.largest <= tolerance:  # A NaN fails as well.
    raise errors.CheckpointError(
      "The written model's logits differ from the live model's.",
      where=str(directory),
      why=f"The largest difference is {gap.largest:.3g}, above {tolerance:g}; "
      f"the KL divergence is {gap.divergence:.3g} nats. "
      f"{compare_layers(live, read)}",
      fix="Do not use this export. Export again; report it if it recurs.",
    )
  return gap.largest
