# SPDX-License-Identifier: Apache-2.0
"""A sampler in this process: prefill, then decoding from a KV cache.

Prefill and decode are separate programs. Their shapes are bucketed, so that
few are compiled. Random numbers depend only on the seed, the prompt's row id,
the index of the completion and that of the token: a prompt samples alike alone
and in any batch.
"""

from collections.abc import Mapping, Sequence
import functools
import time
from typing import Any, Literal, NamedTuple, TypeAlias
import zlib

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax import sharding, types
from atlas_jax.models import attention, decoder, quantized
from rollout import context_length, counters

_MIN_PREFIX = 16
_MIN_SLOTS = 16

# "filtered": top-p or top-k cut the vocabulary, which takes sorting it.
_Method: TypeAlias = Literal["greedy", "filtered", "plain"]


class _Drawn(NamedTuple):
  """Tokens of B completions, of at most S, with both log-probabilities."""

  tokens_BS: jax.Array
  logprobs_BS: jax.Array
  model_logprobs_BS: jax.Array
  lengths_B: jax.Array
  stopped_B: jax.Array


class _Prefix(NamedTuple):
  """P prompts without their last token, padded on the right to T tokens."""

  tokens_PT: np.ndarray
  lengths_P: np.ndarray


class _Rows(NamedTuple):
  """One row per completion: where it starts, and what names its random numbers.

  Rows that only fill a bucket are not `real` and count as stopped.
  """

  last_tokens_B: np.ndarray  # Of the prompts.
  positions_B: np.ndarray  # Of these tokens.
  row_ids_B: np.ndarray  # Hashes of the prompts' row ids.
  members_B: np.ndarray  # Indices of the completions within their groups.
  real_B: np.ndarray


class _Settings(NamedTuple):
  """Settings that no program is compiled for."""

  key: jax.Array  # Of the seed.
  stop_token_ids: np.ndarray
  first_slot: np.int32  # Length of the longest prefix.
  max_new: np.int32
  temperature: np.float32
  top_p: np.float32
  top_k: np.int32


class JaxSampler:
  """Samples with a decoder held in this process.

  It keeps a copy of the weights in the model's dtype, so the trainer may
  donate its own.
  """

  def __init__(
    self,
    model: decoder.Model,
    params: Mapping[str, Any],
    *,
    mesh: jax.sharding.Mesh,
    stop_token_ids: Sequence[int],
    max_rows: int,
  ) -> None:
    """Copies the first weights, as version 0.

    Args:
      model: the decoder to sample from.
      params: its parameters.
      mesh: rows are sharded over it as in any batch.
      stop_token_ids: each ends a completion, and is its last token.
      max_rows: completions decoded at once, or one group per row shard if that
        is more; bounds the KV cache.
    """
    self._model = model
    self._batch = sharding.of_batch(mesh)
    self._num_shards = sharding.num_row_shards(mesh)
    self._stop_token_ids = np.asarray(sorted(stop_token_ids), np.int32)
    self._max_rows = max_rows
    self._counters = counters.Counters()
    self._programs: set[tuple[str, int, int]] = set()
    heads = jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec(sharding.ROWS, "tensor")
    )
    cache = attention.Cache(heads, heads, self._batch, self._batch)  # type: ignore[arg-type] - shardings of its arrays.
    self._prefill = jax.jit(
      functools.partial(_prefill, model), out_shardings=cache
    )
    self._repeat = jax.jit(
      _repeat, static_argnames=("group_size", "num_slots"), out_shardings=cache
    )
    self._decode = jax.jit(
      functools.partial(_decode, model),
      static_argnames="method",
      donate_argnames="cache",
      # Every process reads all completions.
      out_shardings=(sharding.replicated(mesh), cache),
    )
    self.update_weights(params, version=0)

  @property
  def version(self) -> int:
    """The step whose weights it holds."""
    return self._version

  @property
  def context_length(self) -> int:
    """The model's max_position_embeddings."""
    return self._model.config.max_positions

  @property
  def is_concurrent(self) -> bool:
    """False: the devices run one program at a time."""
    return False

  @property
  def num_programs(self) -> int:
    """Number of prefill and decode programs compiled so far."""
    return len(self._programs)

  def update_weights(self, params: Mapping[str, Any], version: int) -> None:
    """Copies new weights, cast to the model's dtype."""
    self._params = _copy(params, self._model.dtype)
    self._version = version

  def sample(
    self, prompts: Sequence[types.Prompt], params: types.SamplingParams
  ) -> list[list[types.Completion]]:
    """Samples `params.group_size` completions for each prompt, in order.

    At temperature 0 both log-probabilities are the model's own.

    Raises:
      errors.ConfigError: if a prompt and its completion do not fit into the
        model's context.
    """
    context_length.check(
      prompts,
      params.max_completion_tokens,
      self.context_length,
      limit_name="The model's max_position_embeddings",
    )
    started = time.monotonic()
    # Prompts of similar length share a batch; the order is restored below.
    order = sorted(
      range(len(prompts)), key=lambda i: -len(prompts[i].token_ids)
    )
    most = max(self._num_shards, self._max_rows // params.group_size)
    per_batch = max(
      size
      for size in range(1, most + 1)
      if _bucket(size, smallest=self._num_shards) <= most
    )
    completions: list[list[types.Completion]] = [[] for _ in prompts]
    for start in range(0, len(order), per_batch):
      chosen = order[start : start + per_batch]
      groups = self._sample_batch([prompts[i] for i in chosen], params)
      for i, group in zip(chosen, groups, strict=True):
        completions[i] = group
    self._counters.add(
      tokens=sum(len(c.token_ids) for group in completions for c in group),
      sample_s=time.monotonic() - started,
    )
    return completions

  def take_metrics(self) -> Mapping[str, float]:
    """Returns metrics such as tokens per second since the last call."""
    return self._counters.take()

  def _sample_batch(
    self, prompts: Sequence[types.Prompt], params: types.SamplingParams
  ) -> list[list[types.Completion]]:
    """Samples one batch, padded to its buckets."""
    size, max_new = params.group_size, params.max_completion_tokens
    num_prompts = _bucket(len(prompts), smallest=self._num_shards)
    prefix = _to_prefix(prompts, num_prompts)
    first_slot = int(prefix.lengths_P.max())
    num_slots = _bucket_slots(first_slot + max_new)
    method = _method(params)
    self._count_program("prefill", *prefix.tokens_PT.shape)
    self._count_program(f"{method} decode", num_prompts * size, num_slots)
    cache = self._prefill(self._params, sharding.put(prefix, self._batch))
    cache = self._repeat(cache, group_size=size, num_slots=num_slots)
    drawn, _ = self._decode(
      self._params,
      cache,
      sharding.put(_to_rows(prompts, num_prompts, size), self._batch),
      _Settings(
        jax.random.key(params.seed),
        self._stop_token_ids,
        np.int32(first_slot),
        np.int32(max_new),
        np.float32(params.temperature or 1.0),
        np.float32(params.top_p),
        np.int32(params.top_k or self._model.config.vocab_size),
      ),
      method=method,
    )
    flat = _to_completions(jax.device_get(drawn), self._version)
    return [flat[i * size : (i + 1) * size] for i in range(len(prompts))]

  def _count_program(self, kind: str, num_rows: int, num_tokens: int) -> None:
    """Logs a program at its first use, when it is compiled."""
    program = (kind, num_rows, num_tokens)
    if program not in self._programs:
      self._programs.add(program)
      logging.info(
        "Sampler program %d: %s of %d rows of %d tokens.",
        len(self._programs),
        *program,
      )


@functools.partial(jax.jit, static_argnames="dtype")
def _copy(params: decoder.Params, dtype: jnp.dtype) -> decoder.Params:
  """Copies parameters, with the layers unstacked for decoding."""
  return jax.tree.map(
    lambda leaf: jnp.array(leaf, dtype=dtype, copy=True),
    decoder.unstack(quantized.restore(params, dtype)),
  )


def _method(params: types.SamplingParams) -> _Method:
  if params.temperature == 0.0:
    return "greedy"
  is_cut = params.top_p < 1.0 or params.top_k > 0
  return "filtered" if is_cut else "plain"


def _bucket(size: int, *, smallest: int) -> int:
  """Rounds up to `smallest` times a power of two, or 1.5 times that."""
  bucket = smallest
  while bucket < size:
    if bucket % 2 == 0 and bucket * 3 // 2 >= size and bucket > smallest:
      return bucket * 3 // 2
    bucket *= 2
  return bucket


def _bucket_slots(num_slots: int) -> int:
  """Rounds up to an eighth of the next power of two, or to `_MIN_SLOTS`.

  Every decoding step attends to all slots, so these buckets are finer: less
  than a quarter is padding.
  """
  multiple = max(_MIN_SLOTS, (1 << (num_slots - 1).bit_length()) // 8)
  return -(-num_slots // multiple) * multiple


def _to_prefix(prompts: Sequence[types.Prompt], num_prompts: int) -> _Prefix:
  """Pads all tokens but the last of each prompt to a bucket."""
  longest = max(len(prompt.token_ids) - 1 for prompt in prompts)
  num_tokens = _bucket(longest, smallest=_MIN_PREFIX)
  prefix = _Prefix(
    np.zeros((num_prompts, num_tokens), np.int32),
    np.zeros((num_prompts,), np.int32),
  )
  for i, prompt in enumerate(prompts):
    *first, _ = prompt.token_ids
    prefix.tokens_PT[i, : len(first)] = first
    prefix.lengths_P[i] = len(first)
  return prefix


def _to_rows(
  prompts: Sequence[types.Prompt], num_prompts: int, group_size: int
) -> _Rows:
  """Describes the rows of each prompt's group, which are consecutive."""
  padding = [0] * (num_prompts - len(prompts))

  def repeat(values: Sequence[int], dtype: type) -> np.ndarray:
    return np.repeat(np.asarray([*values, *padding], dtype), group_size)

  return _Rows(
    last_tokens_B=repeat([p.token_ids[-1] for p in prompts], np.int32),
    positions_B=repeat([len(p.token_ids) - 1 for p in prompts], np.int32),
    row_ids_B=repeat(
      [zlib.crc32(p.row_id.encode()) for p in prompts], np.uint32
    ),
    members_B=np.tile(np.arange(group_size, dtype=np.uint32), num_prompts),
    real_B=repeat([1] * len(prompts), np.bool_),
  )


def _prefill(
  model: decoder.Model, params: decoder.Params, prefix: _Prefix
) -> attention.Cache:
  """Computes the KV cache of P prefixes, in slots 0 to T - 1."""
  tokens_PT, lengths_P = map(jnp.asarray, prefix)
  num_prompts, num_tokens = tokens_PT.shape
  positions_T = jnp.arange(num_tokens)
  _, cache = model.cached(
    params,
    tokens_PT,
    jnp.broadcast_to(positions_T, tokens_PT.shape),
    (positions_T < lengths_P[:, None]).astype(jnp.int32),
    attention.empty_cache(model.config, num_prompts, num_tokens, model.dtype),
    jnp.int32(0),
  )
  return cache


def _repeat(
  cache: attention.Cache, *, group_size: int, num_slots: int
) -> attention.Cache:
  """Repeats the cache of each prompt for its group, with S slots.

  Slots past the longest prefix are padding: they may be cut off.
  """

  def fit(x: jax.Array, axis: int) -> jax.Array:
    x = jax.lax.slice_in_dim(x, 0, min(num_slots, x.shape[axis]), axis=axis)
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, num_slots - x.shape[axis])
    return jnp.repeat(jnp.pad(x, widths), group_size, axis=0)

  return attention.Cache(
    keys=tuple(fit(keys, 2) for keys in cache.keys),
    values=tuple(fit(values, 2) for values in cache.values),
    positions_BS=fit(cache.positions_BS, 1),
    segment_ids_BS=fit(cache.segment_ids_BS, 1),
  )


class _Carry(NamedTuple):
  """State passed from one decoding step to the next."""

  drawn: _Drawn
  step: jax.Array
  tokens_B: jax.Array
  cache: attention.Cache


def _start(rows: _Rows, cache: attention.Cache) -> _Carry:
  """Returns the state before the first step; S slots limit the completions."""
  num_rows, num_slots = cache.positions_BS.shape
  drawn = _Drawn(
    tokens_BS=jnp.zeros((num_rows, num_slots), jnp.int32),
    logprobs_BS=jnp.zeros((num_rows, num_slots)),
    model_logprobs_BS=jnp.zeros((num_rows, num_slots)),
    lengths_B=jnp.zeros((num_rows,), jnp.int32),
    stopped_B=~jnp.asarray(rows.real_B),
  )
  return _Carry(drawn, jnp.int32(0), jnp.asarray(rows.last_tokens_B), cache)


def _decode(
  model: decoder.Model,
  params: decoder.Params,
  cache: attention.Cache,
  rows: _Rows,
  settings: _Settings,
  *,
  method: _Method,
) -> tuple[_Drawn, attention.Cache]:
  """Samples completions of B rows, until all stop or have `max_new` tokens.

  Step i writes slot `first_slot` + i of every row: the last token of its prompt
  at step 0, the token sampled before at later steps. With prompts "abc" and
  "efghi", `first_slot` is 4, and the slots hold

      a b . . c x y z
      e f g h i u v w

  Returns:
    The completions, and the cache, which reuses the memory of its input.
  """
  fold_in = jax.vmap(jax.random.fold_in)
  keys_B = jax.vmap(jax.random.fold_in, (None, 0))(settings.key, rows.row_ids_B)
  keys_B = fold_in(keys_B, rows.members_B)

  def unfinished(carry: _Carry) -> jax.Array:
    return (carry.step < settings.max_new) & ~jnp.all(carry.drawn.stopped_B)

  def advance(carry: _Carry) -> _Carry:
    drawn, step, tokens_B, cache = carry
    hidden_B1D, cache = model.cached(
      params,
      tokens_B[:, None],
      (jnp.asarray(rows.positions_B) + step)[:, None],
      jnp.ones_like(tokens_B)[:, None],
      cache,
      settings.first_slot + step,
    )
    step_keys_B = fold_in(keys_B, jnp.full_like(tokens_B, step))
    tokens_B, *logprobs = _draw(
      model.project(params, hidden_B1D[:, 0]),
      jax.vmap(jax.random.uniform)(step_keys_B),
      settings,
      method=method,
    )
    write = functools.partial(
      jax.lax.dynamic_update_index_in_dim, index=step, axis=1
    )
    drawn = _Drawn(
      *map(write, drawn[:3], (tokens_B, *logprobs)),
      lengths_B=drawn.lengths_B + ~drawn.stopped_B,
      stopped_B=drawn.stopped_B | jnp.isin(tokens_B, settings.stop_token_ids),
    )
    return _Carry(drawn, step + 1, tokens_B, cache)

  carry = jax.lax.while_loop(unfinished, advance, _start(rows, cache))
  return carry.drawn, carry.cache


def _draw(
  logits_BV: jax.Array,
  uniform_B: jax.Array,
  settings: _Settings,
  *,
  method: _Method,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Draws one token per row; returns it with both log-probabilities.

  Inverts the cumulative distribution at a uniform number: one random number per
  token, where the Gumbel-max trick needs V.
  """

  def pick(logprobs_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logprobs_BV, token_B[:, None], axis=-1)[:, 0]

  model_logprobs_BV = jax.nn.log_softmax(logits_BV)
  if method == "greedy":
    token_B = jnp.argmax(logits_BV, axis=-1)
    logprob_B = pick(model_logprobs_BV, token_B)
    return token_B, logprob_B, logprob_B
  logits_BV = logits_BV / settings.temperature
  if method == "filtered":
    logits_BV = _keep_top(logits_BV, settings)
  logprobs_BV = jax.nn.log_softmax(logits_BV)
  cumulative_BV = jnp.cumsum(jnp.exp(logprobs_BV), axis=-1)
  # Rounding leaves the last a little off 1. Scaled by it, the uniform number
  # stays below it, and no token of probability 0 is drawn.
  reached_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
  token_B = jnp.sum(cumulative_BV <= reached_B1, axis=-1)
  logprob_B = pick(logprobs_BV, token_B)
  return token_B, logprob_B, pick(model_logprobs_BV, token_B)


def _keep_top(logits_BV: jax.Array, settings: _Settings) -> jax.Array:
  """Keeps the `top_k` likeliest tokens, and of those the nucleus of `top_p`.

  Source: Holtzman et al., arXiv:1904.09751, for the nucleus.
  """
  sorted_BV = -jnp.sort(-logits_BV, axis=-1)
  in_top_k_V = jnp.arange(logits_BV.shape[-1]) < settings.top_k
  sorted_BV = jnp.where(in_top_k_V, sorted_BV, -jnp.inf)
  probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
  before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
  # The likeliest token is always kept: no mass comes before it.
  kept_BV = in_top_k_V & (before_BV < settings.top_p)
  threshold_B1 = jnp.min(
    jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True
  )
  return jnp.where(logits_BV >= threshold_B1, logits_BV, -jnp.inf)


def _to_completions(drawn: _Drawn, version: int) -> list[types.Completion]:
  """Cuts each row at its length."""
  return [
    types.Completion(
      token_ids=tuple(tokens[:length].tolist()),
      logprobs=tuple(logprobs[:length].tolist()),
      model_logprobs=tuple(model_logprobs[:length].tolist()),
      finish_reason="stop" if stopped else "length",
      version=version,
    )
    for tokens, logprobs, model_logprobs, length, stopped in zip(
      *drawn, strict=True
    )
  ]
