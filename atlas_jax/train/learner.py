# SPDX-License-Identifier: Apache-2.0
"""From rewarded records to updates on the clipped surrogate."""

from collections.abc import Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax import errors, sharding, types
from atlas_jax.losses import grpo, reduce
from atlas_jax.models import decoder
from atlas_jax.train import agreement, rows, score
from atlas_jax.train import state as train_state
from atlas_jax.train import step as train_step


class Learner:
  """Turns rewarded records into updates."""

  def __init__(
    self,
    model: decoder.Model,
    optimizer: Any,  # Any: optax's transformation, a NamedTuple of functions.
    *,
    shardings: Any,  # Any: a tree like the state's.
    mesh: jax.sharding.Mesh,
    config: Any,  # Any: as in `train`.
  ) -> None:
    sampling = config.sampling.teach
    if sampling.temperature == 0 or sampling.top_p < 1 or sampling.top_k:
      raise errors.ConfigError(
        "The policy must be sampled from its whole distribution.",
        where="--config.sampling.teach",
        why="A cut vocabulary or a temperature of 0 has no importance ratio.",
        fix="Set temperature > 0, top_p=1 and top_k=0.",
      )
    self._batch, self._reference = config.batch, config.reference
    self._advantages = config.advantages
    self._max_prob_error = config.agreement.max_prob_error
    self._sharding = sharding.of_batch(mesh)
    num_parts = config.batch.num_minibatches * config.batch.num_microbatches
    self._multiple = mesh.shape["data"] * mesh.shape["fsdp"] * num_parts
    self._score = jax.jit(
      functools.partial(
        _logprobs,
        model,
        temperature=sampling.temperature,
        chunk_size=config.score.chunk_size,
      )
    )
    self._step = train_step.make_step(
      functools.partial(
        _loss,
        model,
        temperature=sampling.temperature,
        chunk_size=config.score.chunk_size,
        **config.loss,
      ),
      optimizer,
      num_microbatches=config.batch.num_microbatches,
      shardings=shardings,
    )
    self._measure = jax.jit(agreement.measure)
    self._correct = jax.jit(
      functools.partial(grpo.sampler_correction, **config.correction)
    )

  def update(
    self,
    state: train_state.TrainState,
    records: Sequence[types.TeachingRecord],
    rewarded: Sequence[types.Reward],
    *,
    is_compared: bool,
  ) -> tuple[train_state.TrainState, dict[str, Any]]:
    """Does the updates of one step; none if no group has anything to teach.

    Trainer and sampler are measured where both had the same weights, and held
    to the bound if `is_compared`.
    """
    advantages_PC = self._group(records, rewarded)
    flat_B = advantages_PC.reshape(-1)
    keep = [
      i
      for i, record in enumerate(records)
      if np.any(advantages_PC[i // advantages_PC.shape[1]])
      and rewarded[i].value is not None
      and not (
        self._batch.mask_truncated
        and record.teacher_rollout.completion.finish_reason == "length"
      )
    ]
    num_groups = int(np.any(advantages_PC, axis=1).sum())
    metrics: dict[str, Any] = {
      "groups/used_fraction": num_groups / len(advantages_PC),
      "num_tokens": sum(_num_tokens(records[i]) for i in keep),
    }
    if keep:
      batch = rows.make_batch(
        [records[i].teacher_rollout for i in keep],
        flat_B[keep],
        multiple=self._multiple,
      )
      batch = jax.device_put(batch, self._sharding)
      scores, entropy_BT = self._scores(state, batch)
      batch |= scores
      metrics["entropy"] = reduce.token_mean(
        entropy_BT, batch["loss_mask"][:, 1:]
      )
      completions = [records[i].teacher_rollout.completion for i in keep]
      if {c.version for c in completions} == {int(state.step)}:
        metrics |= self._compare(batch, int(state.step), is_compared)
      state, updated = self._fit(state, batch)
      metrics |= updated
    return self._sync_reference(state), metrics

  def _group(
    self,
    records: Sequence[types.TeachingRecord],
    rewarded: Sequence[types.Reward],
  ) -> np.ndarray:
    """Computes advantages [P, C]; records are ordered question by question."""
    first = records[0].question.row_id
    size = sum(record.question.row_id == first for record in records)
    values = [0.0 if r.value is None else r.value for r in rewarded]
    valid = [r.value is not None for r in rewarded]
    return np.asarray(
      grpo.group_advantages(
        jnp.reshape(jnp.asarray(values), (-1, size)),
        jnp.reshape(jnp.asarray(valid), (-1, size)),
        **self._advantages,
      )
    )

  def _scores(
    self, state: train_state.TrainState, batch: train_step.Batch
  ) -> tuple[dict[str, jax.Array], jax.Array]:
    """Computes what stays as it is through a step's updates; and entropies."""
    old_BT, entropy_BT = self._score(state.params, batch)
    ref_BT = old_BT
    if state.reference is not None:
      ref_BT, _ = self._score(state.reference, batch)
    rollout_BT = batch["rollout_logprobs"][:, 1:]
    loss_mask_BT = batch["loss_mask"][:, 1:]
    scores = {
      "old_logprobs": old_BT,
      "ref_logprobs": ref_BT,
      "rollout_weights": self._correct(old_BT, rollout_BT, loss_mask_BT),
    }
    return scores, entropy_BT

  def _compare(
    self, batch: train_step.Batch, step: int, is_compared: bool
  ) -> dict[str, jax.Array]:
    """Measures trainer against sampler, before an update makes them differ."""
    measured = self._measure(
      batch["old_logprobs"],
      batch["rollout_logprobs"][:, 1:],
      batch["loss_mask"][:, 1:],
    )
    if is_compared:
      agreement.check(
        float(measured["rollout/prob_error"]),
        step=step,
        max_prob_error=self._max_prob_error,
      )
    return measured

  def _fit(
    self, state: train_state.TrainState, batch: train_step.Batch
  ) -> tuple[train_state.TrainState, dict[str, Any]]:
    """Updates on the minibatches of a scored batch."""
    collected = []
    num_parts = self._batch.num_minibatches
    for _ in range(self._batch.num_iterations):
      for i in range(num_parts):
        part = {k: v[i::num_parts] for k, v in batch.items()}
        state, metrics = self._step(state, part)
        collected.append(metrics)
    means = jax.tree.map(lambda *x: sum(x) / len(x), *collected)
    # Its value: the next update donates the array itself.
    means["num_nonfinite"] = int(state.num_nonfinite)
    return state, means

  def _sync_reference(
    self, state: train_state.TrainState
  ) -> train_state.TrainState:
    """Mixes the policy into the reference every `sync_every` steps."""
    every, mix = self._reference.sync_every, self._reference.mix
    if state.reference is None or not every or (int(state.step) + 1) % every:
      return state

    def mixed(old: jax.Array, new: jax.Array) -> jax.Array:
      value = (1.0 - mix) * train_state.on_device(old) + mix * new
      return jax.device_put(value, old.sharding)

    reference = jax.tree.map(mixed, state.reference, state.params)
    return state._replace(reference=reference)


def _logprobs(
  model: decoder.Model,
  params: decoder.Params,
  batch: train_step.Batch,
  *,
  temperature: float,
  chunk_size: int,
) -> tuple[jax.Array, jax.Array]:
  """Scores a batch: log-probabilities and entropies [B, T - 1]."""
  stats = score.token_stats(
    model,
    train_state.on_device(params),  # A reference may be offloaded.
    batch,
    temperature=temperature,
    chunk_size=chunk_size,
  )
  return stats.logprobs, stats.entropy


def _loss(
  model: decoder.Model,
  params: decoder.Params,
  batch: train_step.Batch,
  *,
  temperature: float,
  chunk_size: int,
  aggregate: reduce.Aggregate,
  **bounds: float,
) -> tuple[jax.Array, tuple[jax.Array, train_step.Metrics]]:
  """Computes the clipped surrogate of a batch; see `step.LossFn`."""
  logprobs_BT, _ = _logprobs(
    model, params, batch, temperature=temperature, chunk_size=chunk_size
  )
  loss_mask_BT = batch["loss_mask"][:, 1:]
  loss, metrics = grpo.clipped_surrogate(
    logprobs_BT,
    batch["old_logprobs"],
    batch["ref_logprobs"],
    batch["advantages"],
    loss_mask_BT,
    rollout_weights_BT=batch["rollout_weights"],
    aggregate=aggregate,
    **bounds,
  )
  counted_B = jnp.any(loss_mask_BT, axis=1)
  by_tokens = aggregate == "token_mean"
  weight = jnp.sum(loss_mask_BT if by_tokens else counted_B)
  return loss, (weight, metrics)


def _num_tokens(record: types.TeachingRecord) -> int:
  rollout = record.teacher_rollout
  return len(rollout.prompt.token_ids) + len(rollout.completion.token_ids)
