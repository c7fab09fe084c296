# SPDX-License-Identifier: Apache-2.0
"""Attention by several kernels, which all honour one description of the mask.

A kernel that would ignore a part of the mask is refused when the model is
built: packed sequences that see each other train a wrong model in silence.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import get_args, Literal, NamedTuple

import jax
from jax import ad_checkpoint
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel,
  splash_attention_mask,
)
import jax.numpy as jnp

from atlas_jax import errors
from atlas_jax.models import layers
from atlas_jax.models import layout as layouts

Kernel = Literal["reference", "xla", "cudnn", "splash"]
Backend = Literal["auto", Kernel]
# From queries [B, T, N, H], keys and values [B, K, S, H] to [B, T, N, H].
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

# What a checkpoint policy may keep of attention, to mix values once only.
MIXED = "mixed_values"
# Queries of each row whose scores exist at one time: few enough for a CPU's
# cache, where the gradient takes 0.4 to 0.6 of the time it takes with all.
_XLA_BLOCK = 64
# Each span of a row has keys of its own: more spans skip more of what is
# masked, three eighths with four, and take longer to compile.
_XLA_SPANS = 4
# The tiles of the TPU kernel are multiples of its lanes.
_LANES = 128
_MAX_SPLASH_BLOCK = 512


class Tokens(NamedTuple):
  """Where tokens are. Segment 0 is padding."""

  positions_BT: jax.Array
  segment_ids_BT: jax.Array


@dataclasses.dataclass(frozen=True)
class Mask:
  """What a query makes of a key, in every kernel.

  It sees the keys of its own segment at positions up to its own; with a
  `window` only as many, its own included. Nobody sees padding. Scores are
  multiplied by `scale`; a `soft_cap` c then makes x into c tanh(x / c).
  """

  window: int | None
  scale: float
  soft_cap: float | None

  def dense(self, queries: Tokens, keys: Tokens) -> jax.Array:
    """Tells which keys each query sees, bool[B, T, S]."""
    segment_ids_B1S = keys.segment_ids_BT[:, None, :]
    same_segment = queries.segment_ids_BT[:, :, None] == segment_ids_B1S
    distance_BTS = (
      queries.positions_BT[:, :, None] - keys.positions_BT[:, None, :]
    )
    near = distance_BTS >= 0
    if self.window is not None:
      near &= distance_BTS < self.window
    return same_segment & (segment_ids_B1S > 0) & near


def choose(
  backend: Backend,
  *,
  platform: str,
  head_width: int,
  dtype: jnp.dtype,
  soft_cap: float | None,
) -> Kernel:
  """Chooses a kernel, or refuses the one asked for.

  Args:
    backend: a kernel, or "auto" for the fastest that can compute this model
      on this platform.
    platform: such as `jax.default_backend` tells.
    head_width: of the model.
    dtype: of its activations.
    soft_cap: of its scores.

  Raises:
    errors.ConfigError: if the kernel cannot do what the model needs.
  """
  if backend not in (*get_args(Kernel), "auto"):
    raise _refused(backend, "There is no such kernel.")
  why_not: dict[str, str] = {}
  if platform not in ("gpu", "cuda"):
    why_not["cudnn"] = f"It runs on NVIDIA's GPUs, and this is a {platform}."
  elif soft_cap is not None:
    why_not["cudnn"] = "It has no soft cap, and this model needs one."
  elif dtype not in (jnp.bfloat16, jnp.float16):
    why_not["cudnn"] = f"It computes in 16 bits, and the model in {dtype}."
  elif head_width % 8 or head_width > 256:
    why_not["cudnn"] = (
      f"Its heads are multiples of 8 up to 256 wide, not {head_width}."
    )
  if platform != "tpu":
    why_not["splash"] = f"It runs on TPUs, and this is a {platform}."
  if backend in why_not:
    raise _refused(backend, why_not[backend])
  if backend != "auto":
    return backend
  return next(k for k in ("cudnn", "splash", "xla") if k not in why_not)


def make(
  kernel: Kernel,
  mask: Mask,
  queries: Tokens,
  keys: Tokens | None = None,
  *,
  layout: layouts.Layout | None = None,
) -> Attend:
  """Makes the function from queries, keys and values to mixed values.

  What depends on the mask alone is computed now, once for all layers. The
  softmax is in float32. A query that sees nothing gets an arbitrary mixture.

  Args:
    kernel: as `choose` chose it.
    mask: what is seen.
    queries: where they are.
    keys: the same for them, wherever they are; "reference" and "xla" take
      them. None if they are the queries' own tokens, those of a segment next
      to each other and in order, as every kernel takes them.
    layout: how rows are spread over a mesh, if there is one.
  """
  match kernel:
    case "reference":
      return _all_at_once(mask, queries, queries if keys is None else keys)
    case "xla":
      return _xla(mask, queries, keys, layout)
    case "cudnn":
      return _cudnn(mask, queries)
    case "splash":
      return splash(mask, queries, layout=layout, interpret=False)


def _mix(
  q_BTNH: jax.Array,
  k_BKSH: jax.Array,
  v_BKSH: jax.Array,
  *,
  mask: Mask,
  seen_BTS: jax.Array,
) -> jax.Array:
  """Mixes values, with scores of all queries and keys at once."""
  batch_size, num_queries, _, width = q_BTNH.shape
  num_kv_heads, num_keys = k_BKSH.shape[1:3]
  # All queries of a group are the rows of one product.
  q_BTKGH = q_BTNH.reshape(batch_size, num_queries, num_kv_heads, -1, width)
  q_BKMH = q_BTKGH.transpose(0, 2, 1, 3, 4).reshape(
    batch_size, num_kv_heads, -1, width
  )
  scores_BKMS = mask.scale * jnp.einsum(
    "BKMH,BKSH->BKMS", q_BKMH, k_BKSH, preferred_element_type=jnp.float32
  )
  scores_BKTGS = layers.soft_cap(scores_BKMS, mask.soft_cap).reshape(
    batch_size, num_kv_heads, num_queries, -1, num_keys
  )
  lowest = jnp.finfo(jnp.float32).min
  scores_BKTGS = jnp.where(seen_BTS[:, None, :, None], scores_BKTGS, lowest)
  weights_BKTGS = jax.nn.softmax(scores_BKTGS).astype(v_BKSH.dtype)
  weights_BKMS = weights_BKTGS.reshape(scores_BKMS.shape)
  mixed_BKMH = jnp.einsum("BKMS,BKSH->BKMH", weights_BKMS, v_BKSH)
  mixed_BKTGH = mixed_BKMH.reshape(
    batch_size, num_kv_heads, num_queries, -1, width
  )
  return mixed_BKTGH.transpose(0, 2, 1, 3, 4).reshape(q_BTNH.shape)


def _all_at_once(mask: Mask, queries: Tokens, keys: Tokens) -> Attend:
  seen_BTS = mask.dense(queries, keys)

  def attend(*qkv: jax.Array) -> jax.Array:
    return ad_checkpoint.checkpoint_name(
      _mix(*qkv, mask=mask, seen_BTS=seen_BTS), MIXED
    )

  return attend


def _xla(
  mask: Mask,
  queries: Tokens,
  keys: Tokens | None,
  layout: layouts.Layout | None,
) -> Attend:
  """Goes through rows by spans, and through spans by blocks of queries.

  A span computes no scores of keys behind it, or wholly out of its window.
  """
  num_tokens = queries.positions_BT.shape[1]
  if num_tokens <= _XLA_BLOCK:
    return _all_at_once(mask, queries, queries if keys is None else keys)
  size = num_tokens
  # Where devices share out tokens, each has some of all blocks: no spans.
  if keys is None and not layouts.splits_tokens(layout):
    size = _XLA_BLOCK * -(-num_tokens // (_XLA_BLOCK * _XLA_SPANS))
  keys = queries if keys is None else keys
  spans = []
  for start in range(0, num_tokens, size):
    end = start + size if size < num_tokens else None
    first = 0 if mask.window is None else max(0, start - mask.window + 1)
    own, seen = slice(start, end), slice(first, end)
    part = (Tokens(*(x[:, own] for x in queries)),)
    part += (Tokens(*(x[:, seen] for x in keys)),)
    spans.append((own, seen, _by_blocks(mask, *part)))

  def attend(
    q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array
  ) -> jax.Array:
    # Float32, so that gradients of spans and blocks are added up in it.
    k32_BKSH, v32_BKSH = (x.astype(jnp.float32) for x in (k_BKSH, v_BKSH))
    mixed = [
      blocks(q_BTNH[:, own], k32_BKSH[:, :, seen], v32_BKSH[:, :, seen])
      for own, seen, blocks in spans
    ]
    return ad_checkpoint.checkpoint_name(jnp.concatenate(mixed, axis=1), MIXED)

  return attend


def _by_blocks(mask: Mask, queries: Tokens, keys: Tokens) -> Attend:
  """Mixes float32 values, computing in the precision of queries.

  The scores of one block exist at a time, and are computed again on the way
  back. What is masked is computed and then thrown away.
  """
  num_tokens = queries.positions_BT.shape[1]
  num_blocks = -(-num_tokens // _XLA_BLOCK)

  def split(x: jax.Array) -> jax.Array:
    """Moves blocks of tokens in front, filled with padding.

    They are dealt out in turn, so that a device which has some tokens of each
    row has some of each block.
    """
    x = _pad(x, num_blocks)
    x = x.reshape(x.shape[0], -1, num_blocks, *x.shape[2:])
    return jnp.moveaxis(x, 2, 0)

  def attend(
    q_BTNH: jax.Array, k32_BKSH: jax.Array, v32_BKSH: jax.Array
  ) -> jax.Array:
    @functools.partial(jax.checkpoint, prevent_cse=False)  # It is in a loop.
    def block(part: tuple[jax.Array, Tokens]) -> jax.Array:
      q_BTNH, queries = part
      return _mix(
        q_BTNH,
        k32_BKSH.astype(q_BTNH.dtype),
        v32_BKSH.astype(q_BTNH.dtype),
        mask=mask,
        seen_BTS=mask.dense(queries, keys),
      )

    parts = (split(q_BTNH), Tokens(*map(split, queries)))
    mixed_BTNH = jnp.moveaxis(jax.lax.map(block, parts), 0, 2)
    mixed_BTNH = mixed_BTNH.reshape(q_BTNH.shape[0], -1, *q_BTNH.shape[2:])
    return mixed_BTNH[:, :num_tokens]

  return attend


def _cudnn(mask: Mask, tokens: Tokens) -> Attend:
  """Adds the mask to the scores as a bias, [B, 1, T, T].

  cuDNN has a layout for packed sequences which would not need it. In jax it is
  no part of the public interface, and jax 0.10 reads the wrong keys with it
  where several query heads share one.
  """
  num_tokens = tokens.positions_BT.shape[1]
  tokens = Tokens(*(_pad(x, 2) for x in tokens))  # It needs an even length.
  seen_B1TS = mask.dense(tokens, tokens)[:, None]

  def attend(
    q_BTNH: jax.Array, k_BKTH: jax.Array, v_BKTH: jax.Array
  ) -> jax.Array:
    k_BTKH, v_BTKH = k_BKTH.swapaxes(1, 2), v_BKTH.swapaxes(1, 2)
    mixed_BTNH = jax.nn.dot_product_attention(
      *(_pad(x, 2) for x in (q_BTNH, k_BTKH, v_BTKH)),
      mask=seen_B1TS,
      scale=mask.scale,
      is_causal=True,  # Spares it the blocks above the diagonal.
      implementation="cudnn",
    )
    return mixed_BTNH[:, :num_tokens]

  return attend


def splash(
  mask: Mask,
  tokens: Tokens,
  *,
  layout: layouts.Layout | None,
  interpret: bool,
) -> Attend:
  """Makes the TPU's kernel; see `make`.

  It skips the blocks that a window or causality leaves empty.

  Args:
    mask: what is seen.
    tokens: queries and keys.
    layout: how rows are spread over a mesh, whose axis "tensor" splits heads.
    interpret: runs it on any platform, slowly, for tests.
  """
  num_tokens = tokens.positions_BT.shape[1]
  segment_ids_BT = _pad(tokens.segment_ids_BT, _LANES)
  length = segment_ids_BT.shape[1]
  block = next(
    size for size in range(_MAX_SPLASH_BLOCK, 0, -_LANES) if length % size == 0
  )
  reach = None if mask.window is None else mask.window - 1
  one_head = splash_attention_mask.LocalMask(
    (length, length), (reach, 0), offset=0
  )

  def on_device(
    q_BNTH: jax.Array,
    k_BKTH: jax.Array,
    v_BKTH: jax.Array,
    segment_ids_BT: jax.Array,
  ) -> jax.Array:
    kernel = splash_attention_kernel.make_splash_mha(
      splash_attention_mask.MultiHeadMask([one_head] * q_BNTH.shape[1]),
      block_sizes=splash_attention_kernel.BlockSizes(
        *(block, block, block),
        *(block, block, block),  # The same for gradients of keys and values.
        *(block, block),  # And of queries.
      ),
      attn_logits_soft_cap=mask.soft_cap,
      head_shards=1,
      q_seq_shards=1,
      residual_checkpoint_name=MIXED,
      interpret=interpret,
    )
    segments = splash_attention_kernel.SegmentIds(
      segment_ids_BT, segment_ids_BT
    )
    mixed = jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH, segments)
    return mixed  # type: ignore[return-value] - a pair only if asked for.

  if layout is not None:
    # The compiler cannot split a kernel by itself.
    heads = jax.sharding.PartitionSpec(*layout.spec[:1], "tensor")
    ids = jax.sharding.PartitionSpec(*layout.spec[:1])
    on_device = jax.shard_map(
      on_device,
      mesh=layout.mesh,
      in_specs=(heads, heads, heads, ids),
      out_specs=heads,
      check_vma=False,
    )

  def attend(
    q_BTNH: jax.Array, k_BKTH: jax.Array, v_BKTH: jax.Array
  ) -> jax.Array:
    q_BTNH *= jnp.asarray(mask.scale, q_BTNH.dtype)
    q_BTNH, k_BTKH, v_BTKH = (
      _pad(x, _LANES)
      for x in (q_BTNH, k_BKTH.swapaxes(1, 2), v_BKTH.swapaxes(1, 2))
    )
    mixed_BNTH = on_device(
      q_BTNH.swapaxes(1, 2),
      k_BTKH.swapaxes(1, 2),
      v_BTKH.swapaxes(1, 2),
      segment_ids_BT,
    )
    return mixed_BNTH.swapaxes(1, 2)[:, :num_tokens]

  return attend


def _pad(x_BT: jax.Array, multiple: int) -> jax.Array:
  """Fills rows with zeros, up to a multiple of so many tokens."""
  padding = -x_BT.shape[1] % multiple
  return jnp.pad(x_BT, [(0, 0), (0, padding), *[(0, 0)] * (x_BT.ndim - 2)])


def _refused(backend: str, why: str) -> errors.ConfigError:
  return errors.ConfigError(
    "Attention cannot be computed like this.",
    where=f"--config.model.attention={backend}",
    why=why,
    fix=f"Set it to one of {get_args(Kernel)} that can, or to auto.",
  )
