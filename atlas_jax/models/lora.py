# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters (LoRA) of a decoder's kernels.

A kernel W stays frozen; W + scale A B is trained, with A and B of low rank.
`lora_a` and `lora_b` are siblings of their `kernel`, so a tree of adapters has
the paths of the parameters and can be joined with or merged into them.

Source: Hu et al., arXiv:2106.09685.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import math
import re

from flax import nnx
import jax
import jax.numpy as jnp

from atlas_jax import errors
from atlas_jax.models import blocks, decoder, layers

_NAMES = ("lora_a", "lora_b")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
  """LoRA settings.

  Attributes:
    rank: rank of every adapter; 0 disables LoRA and trains all parameters.
    alpha: the scale is alpha / rank.
    targets: regular expressions that match full paths within a layer, such as
      `attention/[qkvo]`.
  """

  rank: int
  alpha: float
  targets: Sequence[str]

  def __post_init__(self) -> None:
    """Validates rank and alpha."""
    if self.rank < 0 or self.alpha <= 0.0:
      raise errors.ConfigError(
        f"lora.rank must be >= 0 and lora.alpha > 0, got rank={self.rank} and "
        f"alpha={self.alpha}.",
        where="--config.lora",
        why="Adapters with another rank or scale cannot learn.",
        fix="For example, set rank=16 and alpha=32; rank=0 disables LoRA.",
      )

  @property
  def scale(self) -> float:
    """Factor of the product A B."""
    return self.alpha / self.rank


def adapt(model: decoder.Model, lora: Lora) -> decoder.Model:
  """Returns a model whose targeted layers have adapters.

  Raises:
    errors.ConfigError: if a target matches no layer that supports adapters.
  """

  def block() -> blocks.Block:
    rngs = nnx.Rngs(params=jax.random.key(0))
    made = blocks.Block(model.config, dtype=model.dtype, rngs=rngs)
    for layer in _chosen(made, lora.targets):
      layer.add_adapter(rank=lora.rank, scale=lora.scale)
    return made

  abstract = nnx.eval_shape(block)
  num_layers = model.config.num_layers
  adapters = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct((num_layers, *leaf.shape), leaf.dtype),
    only(nnx.to_pure_dict(nnx.state(abstract))),
  )
  return dataclasses.replace(
    model,
    abstract_params=join(model.abstract_params, {"layers": adapters}),
    block_graph=nnx.graphdef(abstract),
  )


def init(key: jax.Array, abstract_adapters: decoder.Params) -> decoder.Params:
  """Draws A as PEFT does and sets B to zero, so the model starts unchanged.

  A is uniform within 1 / sqrt(fan_in), like torch's `kaiming_uniform_` with
  a = sqrt(5).
  """
  leaves, structure = jax.tree_util.tree_flatten_with_path(abstract_adapters)
  keys = jax.random.split(key, len(leaves))

  def draw(key: jax.Array, name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if name == "lora_b":
      return jnp.zeros(leaf.shape)
    bound = 1.0 / math.sqrt(math.prod(leaf.shape[1:-1]))
    return jax.random.uniform(key, leaf.shape, minval=-bound, maxval=bound)

  drawn = [
    draw(key, path[-1].key, leaf)
    for key, (path, leaf) in zip(keys, leaves, strict=True)
  ]
  return jax.tree.unflatten(structure, drawn)


def only(params: decoder.Params) -> decoder.Params:
  """Returns the adapters of a parameter tree, without other parameters."""
  found = {}
  for name, child in params.items():
    if isinstance(child, Mapping):
      if inner := only(child):
        found[name] = inner
    elif name in _NAMES:
      found[name] = child
  return found


def join(left: decoder.Params, right: decoder.Params) -> decoder.Params:
  """Merges two trees that share no leaf; copies no array."""
  shared = left.keys() & right.keys()
  inner = {name: join(left[name], right[name]) for name in shared}
  return {**left, **right, **inner}


def merge(
  params: decoder.Params, adapters: decoder.Params, scale: float
) -> decoder.Params:
  """Adds each adapter to its kernel: W + scale A B.

  Computed in float32, whatever the dtype of the kernel. Parameters without an
  adapter are not copied.
  """
  if "lora_a" in adapters:
    a, b = (adapters[name].astype(jnp.float32) for name in _NAMES)
    kernel = params["kernel"]
    product = jax.vmap(
      lambda a, b: jnp.tensordot(a, b, 1, precision="highest")
    )(a, b)
    merged = kernel.astype(jnp.float32) + scale * product
    return {**params, "kernel": merged.astype(kernel.dtype)}
  inner = {n: merge(params[n], adapters[n], scale) for n in adapters}
  return {**params, **inner}


def checksums(params: decoder.Params) -> decoder.Params:
  """Sums the bits of each parameter, weighted by position; uint32.

  The sum of w[i] (2 i + 1), with i the flat index of word w[i]. It tells base
  models apart but does not detect forgery. Integers wrap, so the sums do not
  depend on the sharding.
  """

  def of(leaf: jax.Array) -> jax.Array:
    bits = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
    words = jax.lax.bitcast_convert_type(leaf, bits).astype(jnp.uint32)
    index = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(leaf.shape):
      place = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
      index = index * jnp.uint32(size) + place
    # Weights are odd, so that every change of a single word changes the sum.
    return jnp.sum(words * (2 * index + 1), dtype=jnp.uint32)

  return jax.tree.map(of, params)


def fingerprint(sums: decoder.Params) -> str:
  """Returns a short hash of `checksums`."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(sums))
  text = "".join(
    f"{jax.tree_util.keystr(path)}={leaf}\n" for path, leaf in leaves
  )
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _chosen(block: blocks.Block, targets: Sequence[str]) -> list[layers.Linear]:
  """Returns the layers that match the targets; each target must match one."""
  linears = {
    "/".join(map(str, path)): node
    for path, node in nnx.iter_modules(block)
    # Experts are not `Linear`; the router is, but gets no adapter either.
    if isinstance(node, layers.Linear) and path[0] != "mixture"
  }
  for target in targets:
    if not any(re.fullmatch(target, path) for path in linears):
      raise errors.ConfigError(
        f"lora.targets: {target!r} matches no layer that supports adapters.",
        where="--config.lora.targets",
        why=f"Supported layers: {', '.join(linears)}; experts are not.",
        fix="Write a regular expression that matches a full path.",
      )
  return [
    layer
    for path, layer in linears.items()
    if any(re.fullmatch(target, path) for target in targets)
  ]
