# SPDX-License-Identifier: Apache-2.0
"""A sampler in this process: prefill, then decoding from a KV cache.

Shapes are bucketed, so that few programs are compiled whatever the prompts
are. Random numbers depend on the seed, the prompt's row id, the index of the
completion and that of the token, and on nothing else: a prompt samples alike
alone and in any batch.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import time
from typing import Any, NamedTuple
import zlib

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax import sharding, types
from atlas_jax.models import attention, decoder, quantized
from rollout import context_length, counters


class _Drawn(NamedTuple):
  """Tokens drawn for B rows, N at most, with both log-probabilities."""

  tokens_BN: jax.Array
  logprobs_BN: jax.Array
  model_logprobs_BN: jax.Array
  lengths_B: jax.Array
  stopped_B: jax.Array


class _Requests(NamedTuple):
  """P prompts, padded on the right to T tokens.

  `rows` name them to the random numbers; rows that only fill a bucket are not
  `real`, and over before they begin.
  """

  tokens_PT: np.ndarray
  lengths_P: np.ndarray
  rows_P: np.ndarray
  real_P: np.ndarray


class _Cut(NamedTuple):
  """How the distribution is bent before a token is drawn from it."""

  temperature: np.float32
  top_p: np.float32
  top_k: np.int32


@dataclasses.dataclass(frozen=True)
class _Static:
  """What a compiled program is specialised to, besides its shapes."""

  group_size: int
  max_new: int
  greedy: bool
  filtered: bool  # Whether top-p or top-k cut the vocabulary.


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
    """Takes the first weights as version 0.

    Args:
      model: what is sampled from.
      params: its parameters.
      mesh: rows are spread over it as in any batch.
      stop_token_ids: each ends a completion, and is its last token.
      max_rows: completions decoded at once, or one group on each device that
        sees rows of its own, if that is more; bounds the KV cache.
    """
    self._model = model
    self._batch = sharding.of_batch(mesh)
    self._num_shards = sharding.num_row_shards(mesh)
    self._stop_token_ids = np.asarray(sorted(stop_token_ids), np.int32)
    self._max_rows = max_rows
    self._tally = counters.Counters()
    self._programs: set[tuple[Any, ...]] = set()  # Any: shapes and statics.
    self._generate = jax.jit(
      functools.partial(_generate, model),
      static_argnames="static",
      # Each of several processes reads all of it.
      out_shardings=sharding.replicated(mesh),
    )
    self.update_weights(params, version=0)

  @property
  def version(self) -> int:
    """The step whose weights it holds."""
    return self._version

  @property
  def num_programs(self) -> int:
    """How many programs were compiled so far."""
    return len(self._programs)

  def update_weights(self, params: Mapping[str, Any], version: int) -> None:
    """Copies new weights, cast to the model's dtype."""
    self._params = _own(params, self._model.dtype)
    self._version = version

  def sample(
    self, prompts: Sequence[types.Prompt], params: types.SamplingParams
  ) -> list[list[types.Completion]]:
    """Draws `params.group_size` completions for each prompt, in order.

    At temperature 0 both log-probabilities are the model's own.

    Raises:
      errors.ConfigError: if a prompt with its completion would not fit into
        the model's context.
    """
    context_length.check(
      prompts,
      params.max_completion_tokens,
      self._model.config.max_positions,
      limit_name="The model's max_position_embeddings",
    )
    started = time.monotonic()
    # Prompts of like length share a batch; the order is restored below.
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
    self._tally.add(
      tokens=sum(len(c.token_ids) for group in completions for c in group),
      sample_s=time.monotonic() - started,
    )
    return completions

  def take_metrics(self) -> Mapping[str, float]:
    """Gives the tokens per second since it was last asked."""
    return self._tally.take()

  def _sample_batch(
    self, prompts: Sequence[types.Prompt], params: types.SamplingParams
  ) -> list[list[types.Completion]]:
    """Samples one batch, padded to its buckets."""
    num_prompts = _bucket(len(prompts), smallest=self._num_shards)
    length = _bucket(max(len(p.token_ids) for p in prompts), smallest=16)
    requests = _Requests(
      tokens_PT=np.zeros((num_prompts, length), np.int32),
      lengths_P=np.ones((num_prompts,), np.int32),
      rows_P=np.zeros((num_prompts,), np.uint32),
      real_P=np.arange(num_prompts) < len(prompts),
    )
    for i, prompt in enumerate(prompts):
      requests.tokens_PT[i, : len(prompt.token_ids)] = prompt.token_ids
      requests.lengths_P[i] = len(prompt.token_ids)
      requests.rows_P[i] = zlib.crc32(prompt.row_id.encode())
    static = _Static(
      group_size=params.group_size,
      max_new=params.max_completion_tokens,
      greedy=params.temperature == 0.0,
      filtered=params.top_p < 1.0 or params.top_k > 0,
    )
    self._count_program((num_prompts, length, static))
    drawn = self._generate(
      self._params,
      sharding.put(requests, self._batch),
      jax.random.key(params.seed),
      self._stop_token_ids,
      _Cut(
        np.float32(params.temperature or 1.0),
        np.float32(params.top_p),
        np.int32(params.top_k or self._model.config.vocab_size),
      ),
      static=static,
    )
    flat = _to_completions(jax.device_get(drawn), self._version)
    size = params.group_size
    return [flat[i * size : (i + 1) * size] for i in range(len(prompts))]

  def _count_program(self, program: tuple[Any, ...]) -> None:
    if program not in self._programs:
      self._programs.add(program)
      num_prompts, length, static = program
      logging.info(
        "Sampler program %d: %d prompts of %d tokens, %d completions each, "
        "of %d tokens.",
        *(len(self._programs), num_prompts, length),
        *(static.group_size, static.max_new),
      )


@functools.partial(jax.jit, static_argnames="dtype")
def _own(params: decoder.Params, dtype: jnp.dtype) -> decoder.Params:
  """Copies parameters, laid out for decoding."""
  return jax.tree.map(
    lambda leaf: jnp.array(leaf, dtype=dtype, copy=True),
    decoder.unstack(quantized.restore(params, dtype)),
  )


def _bucket(size: int, *, smallest: int) -> int:
  """Rounds up to `smallest` times a power of two, or 1.5 times that."""
  bucket = smallest
  while bucket < size:
    if bucket % 2 == 0 and bucket * 3 // 2 >= size and bucket > smallest:
      return bucket * 3 // 2
    bucket *= 2
  return bucket


class _Carry(NamedTuple):
  """What one decoding step hands to the next."""

  drawn: _Drawn
  step: jax.Array
  logits_BV: jax.Array
  positions_B: jax.Array
  cache: attention.Cache


def _generate(
  model: decoder.Model,
  params: decoder.Params,
  requests: _Requests,
  key: jax.Array,
  stop_token_ids: jax.Array,
  cut: _Cut,
  *,
  static: _Static,
) -> _Drawn:
  """Prefills P prompts once, then decodes C completions of each."""
  length = requests.tokens_PT.shape[1]
  uniform_NB = _uniform(key, jnp.asarray(requests.rows_P), static=static)

  def unfinished(carry: _Carry) -> jax.Array:
    return (carry.step < static.max_new) & ~jnp.all(carry.drawn.stopped_B)

  def advance(carry: _Carry) -> _Carry:
    drawn, step, logits_BV, positions_B, cache = carry
    token_B, logprob_B, model_logprob_B = _draw(
      logits_BV, uniform_NB[step], cut, static=static
    )
    write = jax.lax.dynamic_update_index_in_dim
    drawn = _Drawn(
      write(drawn.tokens_BN, token_B, step, axis=1),
      write(drawn.logprobs_BN, logprob_B, step, axis=1),
      write(drawn.model_logprobs_BN, model_logprob_B, step, axis=1),
      drawn.lengths_B + ~drawn.stopped_B,
      drawn.stopped_B | jnp.isin(token_B, stop_token_ids),
    )
    hidden_B1D, cache = model.cached(
      params,
      token_B[:, None],
      positions_B[:, None],
      jnp.ones_like(token_B)[:, None],
      cache,
      length + step,
    )
    logits_BV = model.project(params, hidden_B1D[:, 0])
    return _Carry(drawn, step + 1, logits_BV, positions_B + 1, cache)

  start = _prefill(model, params, requests, static=static)
  return jax.lax.while_loop(unfinished, advance, start).drawn


def _uniform(
  key: jax.Array, rows_P: jax.Array, *, static: _Static
) -> jax.Array:
  """Draws [0, 1) for every token of every completion.

  Each depends on the prompt's row, the completion's index and its own.
  """
  fold = jax.vmap(jax.random.fold_in, (None, 0))
  keys_P = fold(key, rows_P)
  keys_PC = jax.vmap(fold, (0, None))(keys_P, jnp.arange(static.group_size))
  keys_NB = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))(
    keys_PC.reshape(-1), jnp.arange(static.max_new)
  )
  return jax.vmap(jax.vmap(jax.random.uniform))(keys_NB)


def _prefill(
  model: decoder.Model,
  params: decoder.Params,
  requests: _Requests,
  *,
  static: _Static,
) -> _Carry:
  """Fills the cache from P prompts, and repeats it for C completions."""
  tokens_PT, lengths_P, _, real_P = map(jnp.asarray, requests)
  num_prompts, length = tokens_PT.shape
  real_PT = jnp.arange(length) < lengths_P[:, None]
  cache = attention.empty_cache(
    model.config, num_prompts, length + static.max_new, model.dtype
  )
  hidden_PTD, cache = model.cached(
    params,
    tokens_PT,
    jnp.broadcast_to(jnp.arange(length), tokens_PT.shape),
    real_PT.astype(jnp.int32),
    cache,
    jnp.int32(0),
  )
  last_PD = hidden_PTD[jnp.arange(num_prompts), lengths_P - 1]

  # From here on a row is a completion.
  batch_size = num_prompts * static.group_size
  repeat = functools.partial(
    jnp.repeat, repeats=static.group_size, total_repeat_length=batch_size
  )
  cache = jax.tree.map(functools.partial(repeat, axis=0), cache)
  empty_BN = jnp.zeros((batch_size, static.max_new))
  drawn = _Drawn(
    empty_BN.astype(jnp.int32),
    empty_BN,
    empty_BN,
    jnp.zeros((batch_size,), jnp.int32),
    repeat(~real_P, axis=0),
  )
  logits_BV = model.project(params, repeat(last_PD, axis=0))
  positions_B = repeat(lengths_P, axis=0)
  return _Carry(drawn, jnp.int32(0), logits_BV, positions_B, cache)


def _draw(
  logits_BV: jax.Array,
  uniform_B: jax.Array,
  cut: _Cut,
  *,
  static: _Static,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Draws one token per row, with the log-probabilities it was drawn at.

  The token is where the cumulative distribution passes a uniform number: one
  random number a token, where Gumbel's maximum needs one for each of V.
  """

  def pick(logprobs_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logprobs_BV, token_B[:, None], axis=-1)[:, 0]

  model_logprobs_BV = jax.nn.log_softmax(logits_BV)
  if static.greedy:
    token_B = jnp.argmax(logits_BV, axis=-1)
    logprob_B = pick(model_logprobs_BV, token_B)
    return token_B, logprob_B, logprob_B
  logits_BV = logits_BV / cut.temperature
  if static.filtered:
    logits_BV = _keep_top(logits_BV, cut)
  logprobs_BV = jax.nn.log_softmax(logits_BV)
  cumulative_BV = jnp.cumsum(jnp.exp(logprobs_BV), axis=-1)
  # Rounding leaves the last a little off 1; below it, no token without
  # probability is ever drawn.
  reached_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
  token_B = jnp.sum(cumulative_BV <= reached_B1, axis=-1)
  logprob_B = pick(logprobs_BV, token_B)
  return token_B, logprob_B, pick(model_logprobs_BV, token_B)


def _keep_top(logits_BV: jax.Array, cut: _Cut) -> jax.Array:
  """Keeps the `top_k` likeliest, then of those the nucleus of mass `top_p`.

  Source: Holtzman et al., arXiv:1904.09751, for the nucleus.
  """
  sorted_BV = -jnp.sort(-logits_BV, axis=-1)
  in_top_k_V = jnp.arange(logits_BV.shape[-1]) < cut.top_k
  sorted_BV = jnp.where(in_top_k_V, sorted_BV, -jnp.inf)
  probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
  before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
  # The likeliest token always stays: nothing comes before it.
  kept_BV = in_top_k_V & (before_BV < cut.top_p)
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
