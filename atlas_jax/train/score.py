# SPDX-License-Identifier: Apache-2.0
"""Computes log-probabilities of given tokens under a model."""

from collections.abc import Mapping, Sequence
import functools
from typing import Any

import jax
import numpy as np

from atlas_jax import errors, sharding, types
from atlas_jax.losses import logprobs
from atlas_jax.models import decoder
from atlas_jax.train import rollout_packing


def token_stats(
  model: decoder.Model,
  params: decoder.Params,
  batch: Mapping[str, jax.Array],
  *,
  temperature: float,
  chunk_tokens: int,
  support: logprobs.Support | None = None,
) -> logprobs.TokenStats:
  """Computes statistics of every token but the first of each row.

  Args:
    model: the decoder.
    params: its parameters.
    batch: `token_ids`, `positions` and `segment_ids`, int32[B, T]. The first
      token of each later packed segment is scored too; masks must exclude it.
    temperature: divides the logits.
    chunk_tokens: number of tokens whose logits are in memory at a time.
    support: the sampler's truncation; None for the whole vocabulary.

  Returns:
    Statistics [B, T - 1] of `token_ids[:, 1:]`.
  """
  return token_stats_and_balance(
    model,
    params,
    batch,
    temperature=temperature,
    chunk_tokens=chunk_tokens,
    support=support,
  )[0]


def token_stats_and_balance(
  model: decoder.Model,
  params: decoder.Params,
  batch: Mapping[str, jax.Array],
  *,
  temperature: float,
  chunk_tokens: int,
  support: logprobs.Support | None = None,
) -> tuple[logprobs.TokenStats, jax.Array]:
  """Computes `token_stats`, and the balance loss for `add_balance`."""
  hidden_BTD, balance = model.hidden_and_balance(
    params, batch["token_ids"], batch["positions"], batch["segment_ids"]
  )
  stats = logprobs.of_targets(
    hidden_BTD[:, :-1],
    model.head(params),
    batch["token_ids"][:, 1:],
    temperature=temperature,
    chunk_tokens=chunk_tokens,
    support=support,
    soft_cap=model.config.logit_soft_cap,
  )
  return stats, balance


def add_balance(
  model: decoder.Model,
  loss: jax.Array,
  metrics: dict[str, Any],  # Any: see `optimizer_step.Metrics`.
  balance: jax.Array,
  *,
  router_aux_coef: float,
) -> tuple[jax.Array, dict[str, Any]]:
  """Adds the weighted balance loss of the experts to a loss and its metrics.

  Both are returned unchanged for a model without experts.
  """
  if not model.config.experts:
    return loss, metrics
  loss = loss + router_aux_coef * balance
  return loss, {**metrics, "loss": loss, "router_aux_loss": balance}


def check_balance(model: decoder.Model, *, router_aux_coef: float) -> None:
  """Validates the weight of the balance loss.

  Raises:
    errors.ConfigError: if it is negative, or set for a model without experts.
  """
  is_ignored = router_aux_coef and not model.config.experts
  if is_ignored or router_aux_coef < 0.0:
    rule = "be 0.0 without experts" if is_ignored else "not be negative"
    raise errors.ConfigError(
      f"router_aux_coef must {rule}, got {router_aux_coef}.",
      where=f"--config.experts.router_aux_coef={router_aux_coef}",
      why="It is the weight of the loss that balances the load of experts.",
      fix="Set it to 0.0.",
    )


class Scorer:
  """A `types.Score` for a model whose parameters are in this process."""

  def __init__(
    self,
    model: decoder.Model,
    params: decoder.Params,
    *,
    mesh: jax.sharding.Mesh,
    max_rows: int,
    chunk_tokens: int,
  ) -> None:
    """Creates a scorer; the parameters are not copied.

    Args:
      model: the decoder.
      params: its parameters, which must not be donated.
      mesh: mesh of the parameters; batches are sharded over its rows.
      max_rows: maximum number of completions per batch.
      chunk_tokens: see `token_stats`.
    """
    self._model, self._params, self._max_rows = model, params, max_rows
    self._batch = sharding.of_batch(mesh)
    self._multiple = sharding.num_row_shards(mesh)
    self._stats = jax.jit(
      functools.partial(token_stats, model, chunk_tokens=chunk_tokens),
      static_argnames="temperature",
      out_shardings=sharding.replicated(mesh),
    )

  def __call__(
    self,
    prompts: Sequence[types.Prompt],
    completions: Sequence[Sequence[int]],
    *,
    temperature: float,
  ) -> list[tuple[float, ...] | None]:
    """Scores completions; see `types.Score`."""
    limit = self._model.config.max_positions
    pairs = [
      (prompt.token_ids, tuple(completion))
      for prompt, completion in zip(prompts, completions, strict=True)
    ]
    lengths = [len(prompt) + len(completion) for prompt, completion in pairs]
    # Sorted by length to reduce padding.
    order = [i for i in np.argsort(lengths).tolist() if lengths[i] <= limit]
    scores: list[tuple[float, ...] | None] = [None] * len(pairs)
    for start in range(0, len(order), self._max_rows):
      chosen = order[start : start + self._max_rows]
      batch = rollout_packing.make_tokens(
        [pairs[i] for i in chosen], multiple=self._multiple
      )
      batch = sharding.put(batch, self._batch)
      stats = self._stats(self._params, batch, temperature=temperature)
      for i, row in zip(chosen, np.asarray(stats.logprobs), strict=False):
        # Column t - 1 holds the score of token t.
        begin = len(pairs[i][0]) - 1
        scores[i] = tuple(row[begin : lengths[i] - 1].tolist())
    return scores
