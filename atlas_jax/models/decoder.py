# SPDX-License-Identifier: Apache-2.0
"""One decoder for every model family, as pure functions of parameters.

Only `models` uses Flax NNX. `build` splits the module once and returns a
`Model`, whose methods take `params`: a nested dict with paths such as
`layers/attention/q/kernel`. The parameters of all layers are stacked along
axis 0, and the layers run in one scan.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, Literal

from flax import nnx
import jax
from jax import ad_checkpoint
import jax.numpy as jnp

from atlas_jax.models import (
  attention,
  blocks,
  decoder_config,
  experts,
  kernels,
  layers,
  quantized,
)
from atlas_jax.models import layout as layouts
from atlas_jax.models import rope as rope_lib

Params = Mapping[str, Any]  # Any: nested dicts with arrays as leaves.
Remat = Literal["none", "dots", "block", "offload"]

_INPUT = "block_input"
_POLICIES = {
  "dots": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(kernels.MIXED),
  ),
  "block": jax.checkpoint_policies.nothing_saveable,
  "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=[_INPUT],
    offload_src="device",
    offload_dst="pinned_host",
  ),
}


class Embedding(nnx.Module):
  """Token embedding."""

  def __init__(
    self, config: decoder_config.DecoderConfig, *, rngs: nnx.Rngs
  ) -> None:
    """Draws the embedding table."""
    shape = (config.vocab_size, config.width)
    table = jax.random.normal(rngs.params(), shape)
    self.embedding = nnx.Param(config.initializer_range * table)


class Decoder(nnx.Module):
  """Embedding, blocks, final norm and, unless tied, an output head."""

  def __init__(
    self,
    config: decoder_config.DecoderConfig,
    *,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
  ) -> None:
    """Draws the parameters; those of the blocks are stacked along axis 0."""

    def make_block(rngs: nnx.Rngs) -> blocks.Block:
      return blocks.Block(config, dtype=dtype, rngs=rngs)

    self.embed = Embedding(config, rngs=rngs)
    self.layers = nnx.vmap(make_block)(rngs.split(config.num_layers))
    self.final_norm = layers.RMSNorm(
      config.width,
      epsilon=config.norm_epsilon,
      zero_centered=config.zero_centered_norms,
      dtype=dtype,
    )
    if not config.tie_embeddings:
      self.head = layers.Linear(
        (config.width,),
        (config.vocab_size,),
        use_bias=False,
        scale=config.initializer_range,
        dtype=dtype,
        rngs=rngs,
      )


@dataclasses.dataclass(frozen=True)
class Model:
  """A decoder as pure functions of its parameters.

  `dtype` is the dtype of activations; parameters keep theirs. `kernel` computes
  attention over whole sequences. `block_graph` is the NNX graph of a block,
  without parameters. `layout` shards activations over a mesh: without it, the
  compiler may shard their width like the embedding's and replicate the rows.
  """

  config: decoder_config.DecoderConfig
  dtype: jnp.dtype
  kernel: kernels.Kernel
  abstract_params: Params  # With `jax.ShapeDtypeStruct` as leaves.
  block_graph: nnx.GraphDef[blocks.Block]
  remat: Remat
  _unroll: int
  layout: layouts.Layout | None

  def init(self, key: jax.Array) -> Params:
    """Draws float32 parameters."""
    module = Decoder(self.config, dtype=self.dtype, rngs=nnx.Rngs(params=key))
    return nnx.to_pure_dict(nnx.state(module))

  def hidden(
    self,
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
  ) -> jax.Array:
    """Computes the normalised last hidden states, [B, T, D].

    Args:
      params: as returned by `init`.
      tokens_BT: token ids.
      positions_BT: restart at 0 in each packed sequence.
      segment_ids_BT: 0 is padding; tokens attend to their own segment only.

    Returns:
      Hidden states in `dtype`; `project` maps them to logits.
    """
    return self.hidden_and_balance(
      params, tokens_BT, positions_BT, segment_ids_BT
    )[0]

  def hidden_and_balance(
    self,
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    """Computes `hidden` and `experts.balance_loss`, 0 without experts."""
    tokens = kernels.Tokens(positions_BT, segment_ids_BT)
    views = self._views(tokens, None, self.kernel)

    def body(
      x_BTD: jax.Array, layer: tuple[Params, jax.Array]
    ) -> tuple[jax.Array, experts.Load | None]:
      block, is_local = layer
      x_BTD = ad_checkpoint.checkpoint_name(x_BTD, _INPUT)
      return self._block(block)(x_BTD, views(is_local), self.layout)

    if self.remat != "none":
      # Without a loop between a block and its recomputation in the backward
      # pass, the compiler would merge the two and keep the activations.
      is_loop = self._unroll < self.config.num_layers
      body = jax.checkpoint(
        body, policy=_POLICIES[self.remat], prevent_cse=not is_loop
      )
    x_BTD, load = jax.lax.scan(
      body,
      self._embed(params, tokens_BT),
      (params["layers"], jnp.asarray(self.config.local)),
      unroll=self._unroll,
    )
    balance = jnp.float32(0.0)
    if load is not None:
      num_tokens = self.config.num_layers * jnp.sum(segment_ids_BT > 0)
      load = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), load)
      balance = experts.balance_loss(load, num_tokens)
    return self._final_norm(params, x_BTD), balance

  def states(
    self,
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
  ) -> list[jax.Array]:
    """Returns the residual stream after the embedding and after each layer.

    Used to locate where two models diverge; `hidden` keeps only the last one.
    """
    tokens = kernels.Tokens(positions_BT, segment_ids_BT)
    views = self._views(tokens, None, self.kernel)
    found = [self._embed(params, tokens_BT)]
    taken_apart = unstack(params)["layers"]
    for block, is_local in zip(taken_apart, self.config.local, strict=True):
      x_BTD, _ = self._block(block)(found[-1], views(is_local), self.layout)
      found.append(x_BTD)
    return found

  def cached(
    self,
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    cache: attention.Cache,
    slot: jax.Array,
  ) -> tuple[jax.Array, attention.Cache]:
    """Computes hidden states of new tokens that follow those in the cache.

    Args:
      params: as returned by `unstack`.
      tokens_BT: the new tokens: a whole prompt, or one per row.
      positions_BT: their positions.
      segment_ids_BT: 0 is padding.
      cache: earlier tokens; T slots from `slot` on are overwritten.
      slot: the first slot to write, the same for all rows.

    Returns:
      Hidden states [B, T, D], and the cache with T more slots filled.
    """
    write = jax.lax.dynamic_update_slice_in_dim
    positions_BS = write(cache.positions_BS, positions_BT, slot, axis=1)
    segments_BS = write(cache.segment_ids_BS, segment_ids_BT, slot, axis=1)
    views = self._views(
      kernels.Tokens(positions_BT, segment_ids_BT),
      kernels.Tokens(positions_BS, segments_BS),
      "xla",  # The other kernels require keys in order of their positions.
    )

    x_BTD, keys, values = self._embed(params, tokens_BT), [], []
    for block, is_local, keys_BKSH, values_BKSH in zip(
      params["layers"],
      self.config.local,
      cache.keys,
      cache.values,
      strict=True,
    ):
      x_BTD, keys_BKSH, values_BKSH = self._block(block).cached(
        x_BTD, views(is_local), keys_BKSH, values_BKSH, slot
      )
      keys.append(keys_BKSH)
      values.append(values_BKSH)
    cache = attention.Cache(
      tuple(keys), tuple(values), positions_BS, segments_BS
    )
    return self._final_norm(params, x_BTD), cache

  def head(self, params: Params) -> jax.Array:
    """Returns the kernel from hidden states to logits, [D, V]."""
    if self.config.tie_embeddings:
      return params["embed"]["embedding"].T
    return params["head"]["kernel"]

  def logits(
    self,
    params: Params,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
  ) -> jax.Array:
    """Computes float32 logits [B, T, V]; losses use chunks instead."""
    hidden_BTD = self.hidden(params, tokens_BT, positions_BT, segment_ids_BT)
    return self.project(params, hidden_BTD)

  def project(self, params: Params, hidden_BTD: jax.Array) -> jax.Array:
    """Projects hidden states to float32 logits."""
    logits_BTV = jnp.einsum(
      "...D,DV->...V",
      hidden_BTD,
      self.head(params).astype(self.dtype),
      preferred_element_type=jnp.float32,
    )
    return layers.soft_cap(logits_BTV, self.config.logit_soft_cap)

  def read_off(self, params: Params, x_BTD: jax.Array) -> jax.Array:
    """Projects the residual stream after any layer to float32 logits.

    After the last layer, these are the model's `logits`; before it, those of
    the model truncated after that layer.
    """
    return self.project(params, self._final_norm(params, x_BTD))

  def _block(self, params: Params) -> blocks.Block:
    """Returns a block with the given parameters, kernels dequantized."""
    restored = quantized.restore(params, self.dtype)
    return nnx.merge(self.block_graph, nnx.State(restored))

  def _views(
    self,
    queries: kernels.Tokens,
    keys: kernels.Tokens | None,
    kernel: kernels.Kernel,
  ) -> Callable[[jax.Array | bool], blocks.View]:
    """Returns a function from whether a layer is local to its `View`."""
    config = self.config

    def view(rope: rope_lib.Rope, window: int | None) -> blocks.View:
      mask = kernels.Mask(
        window, config.attention_scale, config.attention_soft_cap
      )
      return blocks.View(
        rope.turns(queries.positions_BT),
        kernels.make(kernel, mask, queries, keys, layout=self.layout),
        queries.segment_ids_BT > 0,
      )

    if not any(config.local):
      everything = view(config.rope, None)
      return lambda _: everything
    near = view(config.local_rope, config.window)
    if all(config.local):
      return lambda _: near
    everything = view(config.rope, None)

    def choose(is_local: jax.Array | bool) -> blocks.View:
      if isinstance(is_local, bool):
        return near if is_local else everything
      turns = jax.tree.map(
        lambda a, b: jnp.where(is_local, a, b), near.turns, everything.turns
      )

      def attend(
        q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array
      ) -> jax.Array:
        # A window is compiled into some kernels, so both are compiled.
        return jax.lax.cond(
          is_local, near.attend, everything.attend, q_BTNH, k_BKSH, v_BKSH
        )

      return blocks.View(turns, attend, near.counted_BT)

    return choose

  def _embed(self, params: Params, tokens_BT: jax.Array) -> jax.Array:
    x_BTD = params["embed"]["embedding"].astype(self.dtype)[tokens_BT]
    x_BTD = layouts.spread(x_BTD, self.layout)
    # The scale is rounded to `dtype`, as in Gemma; other families have 1.
    return x_BTD * jnp.asarray(self.config.embedding_scale, self.dtype)

  def _final_norm(self, params: Params, x_BTD: jax.Array) -> jax.Array:
    return layers.rms_norm(
      x_BTD,
      params["final_norm"]["scale"],
      epsilon=self.config.norm_epsilon,
      zero_centered=self.config.zero_centered_norms,
      dtype=self.dtype,
    )


def unstack(params: Params) -> Params:
  """Unstacks the layers into a list with the parameters of each.

  Decoding uses a Python loop over layers: a scan would copy a layer's kernels
  and cache for every token.
  """
  stacked = params["layers"]
  num_layers = len(jax.tree.leaves(stacked)[0])
  layers = [
    jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(num_layers)
  ]
  return {**params, "layers": layers}


def build(
  config: decoder_config.DecoderConfig,
  *,
  dtype: str,
  attention: kernels.Backend,
  remat: Remat,
  unroll: int,
  layout: layouts.Layout | None = None,
) -> Model:
  """Builds the pure functions of a decoder; allocates no parameters.

  Args:
    config: shape of the decoder.
    dtype: of activations and matrix products, such as "bfloat16".
    attention: the kernel, or "auto"; see `kernels.choose`.
    remat: what is saved for the backward pass. "none" saves everything, "dots"
      only projections and attention outputs, "block" only each block's input.
      "offload" is "block" with these inputs in pinned host memory.
    unroll: layers per scan step; more compile longer and run faster on a CPU.
    layout: sharding of activations; None leaves it to the compiler.

  Raises:
    errors.ConfigError: if the kernel does not support this model or platform.
  """
  if remat not in ("none", *_POLICIES):
    raise ValueError(
      f"remat must be one of {('none', *_POLICIES)}, got {remat!r}."
    )
  activation = jnp.dtype(dtype)
  kernel = kernels.choose(
    attention,
    platform=jax.default_backend(),
    head_width=config.head_width,
    dtype=activation,
    soft_cap=config.attention_soft_cap,
  )

  def decoder() -> Decoder:
    rngs = nnx.Rngs(params=jax.random.key(0))
    return Decoder(config, dtype=activation, rngs=rngs)

  def block() -> blocks.Block:
    rngs = nnx.Rngs(params=jax.random.key(0))
    return blocks.Block(config, dtype=activation, rngs=rngs)

  abstract = nnx.to_pure_dict(nnx.state(nnx.eval_shape(decoder)))
  block_graph = nnx.graphdef(nnx.eval_shape(block))
  return Model(
    config=config,
    dtype=activation,
    kernel=kernel,
    abstract_params=abstract,
    block_graph=block_graph,
    remat=remat,
    _unroll=unroll,
    layout=layout,
  )
