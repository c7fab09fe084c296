# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters over a decoder's kernels.

A kernel W stays as it is; what is trained is W + scale A B, with A and B of a
small rank. The two are `lora_a` and `lora_b` beside their `kernel`, so that a
tree of adapters has the paths of the parameters, and is joined with them or
merged into them.

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
  """What adapters a model gets.

  Attributes:
    rank: of every adapter; 0 for none, and then all parameters are trained.
    alpha: the scale is alpha / rank.
    targets: regular expressions that match a whole path within a layer, such
      as `attention/[qkvo]`.
  """

  rank: int
  alpha: float
  targets: Sequence[str]

  def __post_init__(self) -> None:
    """Refuses adapters that could not learn."""
    if self.rank < 0 or self.alpha <= 0.0:
      raise errors.ConfigError(
        "Adapters of this rank and scale cannot learn.",
        where="--config.lora",
        why=f"rank is {self.rank}, alpha is {self.alpha}.",
        fix="Set rank to 16 and alpha to 32, for example; rank=0 is without.",
      )

  @property
  def scale(self) -> float:
    """What the product of A and B is multiplied with."""
    return self.alpha / self.rank


def adapt(model: decoder.Model, lora: Lora) -> decoder.Model:
  """Gives a model that computes with adapters besides its parameters.

  Raises:
    errors.ConfigError: if a target matches no layer that can have one.
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
  """Draws A as PEFT does and sets B to zero: at first nothing changes.

  A is uniform within 1 / sqrt(inputs), which is what torch calls
  `kaiming_uniform_` with a = sqrt(5).
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
  """Gives the adapters of a tree alone."""
  found = {}
  for name, child in params.items():
    if isinstance(child, Mapping):
      if inner := only(child):
        found[name] = inner
    elif name in _NAMES:
      found[name] = child
  return found


def join(left: decoder.Params, right: decoder.Params) -> decoder.Params:
  """Makes one tree of two that share no leaf; copies no array."""
  shared = left.keys() & right.keys()
  inner = {name: join(left[name], right[name]) for name in shared}
  return {**left, **right, **inner}


def merge(
  params: decoder.Params, adapters: decoder.Params, scale: float
) -> decoder.Params:
  """Adds each adapter to its kernel: W + scale A B.

  Computed in float32, whatever the kernel's precision is. What has no adapter
  is not copied.
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
  """Sums the bits of each parameter, weighted by where they are; uint32.

  Tells one base model from another, not from a forged one. Integers wrap, so
  the sums are the same however the arrays are laid out.
  """

  def of(leaf: jax.Array) -> jax.Array:
    bits = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
    words = jax.lax.bitcast_convert_type(leaf, bits).astype(jnp.uint32)
    index = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(leaf.shape):
      place = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
      index = index * jnp.uint32(size) + place
    # Odd weights: no single change of a word goes unseen.
    return jnp.sum(words * (2 * index + 1), dtype=jnp.uint32)

  return jax.tree.map(of, params)


def fingerprint(sums: decoder.Params) -> str:
  """Names parameters by their `checksums`."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(sums))
  text = "".join(
    f"{jax.tree_util.keystr(path)}={leaf}\n" for path, leaf in leaves
  )
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _chosen(block: blocks.Block, targets: Sequence[str]) -> list[layers.Linear]:
  """Finds the layers that the targets name; each must name one."""
  linears = {
    "/".join(map(str, path)): node
    for path, node in nnx.iter_modules(block)
    # An expert sees few tokens; its kernels are no `Linear`, its router is.
    if isinstance(node, layers.Linear) and path[0] != "mixture"
  }
  for target in targets:
    if not any(re.fullmatch(target, path) for path in linears):
      raise errors.ConfigError(
        f"No layer that can have an adapter is called {target!r}.",
        where="--config.lora.targets",
        why=f"They are {', '.join(linears)}; a mixture's experts have none.",
        fix="Write a regular expression that matches a whole name.",
      )
  return [
    layer
    for path, layer in linears.items()
    if any(re.fullmatch(target, path) for target in targets)
  ]
