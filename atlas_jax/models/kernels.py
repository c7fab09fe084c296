# SPDX-License-Identifier: Apache-2.0
"""Attention kernels that all implement the same `Mask`.

A kernel that would ignore a part of the mask is rejected when the model is
built: attention across packed sequences would silently train a wrong model.
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
# Maps queries [B, T, N, H], keys and values [B, K, S, H] to [B, T, N, H].
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

# Name under which a checkpoint policy can save attention outputs.
MIXED = "mixed_values"
# Queries per row whose scores exist at one time. Small enough for a CPU's
# cache: the gradient takes 0.4 to 0.6 times as long as with all queries.
_XLA_BLOCK = 64
# Each span of queries has its own keys. More spans skip more masked scores,
# three eighths with four spans, but take longer to compile.
_XLA_SPANS = 4
# Block sizes of the TPU kernel must be multiples of the lane count.
_LANES = 128
_MAX_SPLASH_BLOCK = 512


class Tokens(NamedTuple):
  """Positions and segments of tokens; segment 0 is padding."""

  positions_BT: jax.Array
  segment_ids_BT: jax.Array


@dataclasses.dataclass(frozen=True)
class Mask:
  """Attention mask and score transform, the same in every kernel.

  A query attends to the keys of its own segment at positions up to its own;
  with a `window`, to the last `window` of them, its own included. Padding is
  never attended to. Scores are multiplied by `scale`; a `soft_cap` c then maps
  a score x to c tanh(x / c).
  """

  window: int | None
  scale: float
  soft_cap: float | None

  def dense(self, queries: Tokens, keys: Tokens) -> jax.Array:
    """Returns which keys each query attends to, bool[B, T, S].

    With q and k the positions of a query and a key:

      same segment  and  segment > 0  and  0 <= q - k < window

      segments  1 1 1 2 2 0      x . . . . .
      window = 2                 x x . . . .
                                 . x x . . .
                                 . . . x . .
                                 . . . x x .
                                 . . . . . .  padding
    """
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
  """Returns the kernel to use.

  Args:
    backend: a kernel, or "auto" for the fastest one that supports this model
      on this platform.
    platform: as returned by `jax.default_backend`.
    head_width: head width of the model.
    dtype: dtype of the activations.
    soft_cap: soft cap of the attention scores.

  Raises:
    errors.ConfigError: if the kernel does not support the model or platform.
  """
  if backend not in (*get_args(Kernel), "auto"):
    raise _unsupported(backend, "The kernel is unknown.")
  why_not: dict[str, str] = {}
  if platform not in ("gpu", "cuda"):
    why_not["cudnn"] = f"It requires an NVIDIA GPU; the platform is {platform}."
  elif soft_cap is not None:
    why_not["cudnn"] = "It has no soft cap, which this model requires."
  elif dtype not in (jnp.bfloat16, jnp.float16):
    why_not["cudnn"] = f"It requires a 16-bit dtype, got {dtype}."
  elif head_width % 8 or head_width > 256:
    why_not["cudnn"] = (
      "It requires a head width that is a multiple of 8 and at most 256, got "
      f"{head_width}."
    )
  if platform != "tpu":
    why_not["splash"] = f"It requires a TPU; the platform is {platform}."
  if backend in why_not:
    raise _unsupported(backend, why_not[backend])
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
  """Returns the attention function for a mask and token positions.

  Everything that depends on the mask alone is computed here, once for all
  layers. The softmax is in float32. The output of a query that attends to
  nothing is arbitrary.

  Args:
    kernel: as returned by `choose`.
    mask: which keys are attended to.
    queries: positions and segments of the queries.
    keys: the same of the keys, in any order; supported by "reference" and
      "xla". None if they are the queries' own tokens, where each segment is
      contiguous and in order; supported by every kernel.
    layout: sharding of the activations; None for no mesh.
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
  """Computes attention with the scores of all queries and keys at once."""
  batch_size, num_queries, _, width = q_BTNH.shape
  num_kv_heads, num_keys = k_BKSH.shape[1:3]
  # M = T G: all queries of a key/value head are the rows of one product.
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
  """Splits rows into spans of queries, and spans into blocks of queries.

  A span computes no scores of later keys, nor of keys outside its window:

    queries [start, end)  x  keys [max(0, start - window + 1), end)

  Four spans without a window (x computed, . skipped):

    x . . .
    x x . .
    x x x .
    x x x x
  """
  num_tokens = queries.positions_BT.shape[1]
  if num_tokens <= _XLA_BLOCK:
    return _all_at_once(mask, queries, queries if keys is None else keys)
  size = num_tokens
  # With tokens split over devices, each device has a part of every block, and
  # slicing spans would move tokens.
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
    # In float32, because gradients of keys and values are summed over blocks.
    k32_BKSH, v32_BKSH = (x.astype(jnp.float32) for x in (k_BKSH, v_BKSH))
    mixed = [
      blocks(q_BTNH[:, own], k32_BKSH[:, :, seen], v32_BKSH[:, :, seen])
      for own, seen, blocks in spans
    ]
    return ad_checkpoint.checkpoint_name(jnp.concatenate(mixed, axis=1), MIXED)

  return attend


def _by_blocks(mask: Mask, queries: Tokens, keys: Tokens) -> Attend:
  """Computes attention one block of queries at a time.

  Keys and values are float32; products are in the dtype of the queries. The
  scores of one block exist at a time and are recomputed in the backward pass.
  Masked scores within a block are computed, then discarded.
  """
  num_tokens = queries.positions_BT.shape[1]
  num_blocks = -(-num_tokens // _XLA_BLOCK)

  def split(x: jax.Array) -> jax.Array:
    """Pads tokens and moves a leading block axis in front.

    Block b holds tokens b, b + num_blocks, b + 2 num_blocks, ...: a device
    that has a contiguous part of each row then has a part of each block.
    """
    x = _pad(x, num_blocks)
    x = x.reshape(x.shape[0], -1, num_blocks, *x.shape[2:])
    return jnp.moveaxis(x, 2, 0)

  def attend(
    q_BTNH: jax.Array, k32_BKSH: jax.Array, v32_BKSH: jax.Array
  ) -> jax.Array:
    # prevent_cse is not needed inside the loop of `lax.map`.
    @functools.partial(jax.checkpoint, prevent_cse=False)
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
  """Passes the mask to cuDNN as a bias on the scores, [B, 1, T, T].

  cuDNN also has a layout for packed sequences that needs no bias. JAX does not
  expose it publicly, and with jax 0.10 it reads the wrong keys where several
  query heads share a key/value head.
  """
  num_tokens = tokens.positions_BT.shape[1]
  tokens = Tokens(*(_pad(x, 2) for x in tokens))  # cuDNN needs an even length.
  seen_B1TS = mask.dense(tokens, tokens)[:, None]

  def attend(
    q_BTNH: jax.Array, k_BKTH: jax.Array, v_BKTH: jax.Array
  ) -> jax.Array:
    k_BTKH, v_BTKH = k_BKTH.swapaxes(1, 2), v_BKTH.swapaxes(1, 2)
    mixed_BTNH = jax.nn.dot_product_attention(
      *(_pad(x, 2) for x in (q_BTNH, k_BTKH, v_BTKH)),
      mask=seen_B1TS,
      scale=mask.scale,
      is_causal=True,  # Skips blocks above the diagonal.
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
  """Returns the attention function of the TPU kernel; see `make`.

  It skips blocks that causality or a window leave empty.

  Args:
    mask: which keys are attended to.
    tokens: positions and segments of queries and keys.
    layout: sharding of the activations; the mesh axis "tensor" splits heads.
    interpret: runs on any platform, slowly, for tests.
  """
  num_tokens = tokens.positions_BT.shape[1]
  segment_ids_BT = _pad(tokens.segment_ids_BT, _LANES)
  make_kernel = _splash_kernel(
    mask, segment_ids_BT.shape[1], interpret=interpret
  )

  def on_device(
    q_BNTH: jax.Array,
    k_BKTH: jax.Array,
    v_BKTH: jax.Array,
    segment_ids_BT: jax.Array,
  ) -> jax.Array:
    kernel = make_kernel(q_BNTH.shape[1])
    segments = splash_attention_kernel.SegmentIds(
      segment_ids_BT, segment_ids_BT
    )
    mixed = jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH, segments)
    return mixed  # type: ignore[return-value] - a pair only if requested.

  mapped = on_device if layout is None else _on_mesh(on_device, layout)

  def attend(
    q_BTNH: jax.Array, k_BKTH: jax.Array, v_BKTH: jax.Array
  ) -> jax.Array:
    q_BTNH *= jnp.asarray(mask.scale, q_BTNH.dtype)
    q_BTNH, k_BTKH, v_BTKH = (
      _pad(x, _LANES)
      for x in (q_BTNH, k_BKTH.swapaxes(1, 2), v_BKTH.swapaxes(1, 2))
    )
    mixed_BNTH = mapped(
      q_BTNH.swapaxes(1, 2),
      k_BTKH.swapaxes(1, 2),
      v_BTKH.swapaxes(1, 2),
      segment_ids_BT,
    )
    return mixed_BNTH.swapaxes(1, 2)[:, :num_tokens]

  return attend


def _splash_kernel(
  mask: Mask, length: int, *, interpret: bool
) -> Callable[[int], splash_attention_kernel.SplashAttentionKernel]:
  """Returns a function from a number of heads to the kernel for `length`."""
  block = next(
    size for size in range(_MAX_SPLASH_BLOCK, 0, -_LANES) if length % size == 0
  )
  # Keys q - reach <= k <= q + 0 of a query q.
  reach = None if mask.window is None else mask.window - 1
  one_head = splash_attention_mask.LocalMask(
    (length, length), (reach, 0), offset=0
  )

  def make_kernel(
    num_heads: int,
  ) -> splash_attention_kernel.SplashAttentionKernel:
    return splash_attention_kernel.make_splash_mha(
      splash_attention_mask.MultiHeadMask([one_head] * num_heads),
      block_sizes=splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
      ),
      attn_logits_soft_cap=mask.soft_cap,
      head_shards=1,
      q_seq_shards=1,
      residual_checkpoint_name=MIXED,
      interpret=interpret,
    )

  return make_kernel


def _on_mesh(
  on_device: Callable[..., jax.Array], layout: layouts.Layout
) -> Callable[..., jax.Array]:
  """Shards rows and heads explicitly: the compiler cannot split a kernel."""
  heads = jax.sharding.PartitionSpec(*layout.spec[:1], "tensor")
  ids = jax.sharding.PartitionSpec(*layout.spec[:1])
  return jax.shard_map(
    on_device,
    mesh=layout.mesh,
    in_specs=(heads, heads, heads, ids),
    out_specs=heads,
    check_vma=False,
  )


def _pad(x_BT: jax.Array, multiple: int) -> jax.Array:
  """Pads axis 1 with zeros to a multiple of `multiple`."""
  padding = -x_BT.shape[1] % multiple
  return jnp.pad(x_BT, [(0, 0), (0, padding), *[(0, 0)] * (x_BT.ndim - 2)])


def _unsupported(backend: str, why: str) -> errors.ConfigError:
  return errors.ConfigError(
    f"Attention kernel {backend!r} is unsupported here.",
    where=f"--config.model.attention={backend}",
    why=why,
    fix=f"Set it to a supported one of {get_args(Kernel)}, or to auto.",
  )
