# SPDX-License-Identifier: Apache-2.0
"""From rewarded records to updates of the policy."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from atlas_jax import errors, sharding, types
from atlas_jax.losses import advantages, correction, grpo, kl, logprobs, reduce
from atlas_jax.models import decoder
from atlas_jax.train import optimizer as train_optimizer
from atlas_jax.train import (
  optimizer_step,
  rollout_packing,
  score,
  train_state,
  trainable,
)
from atlas_jax.train.guards import agreement, alarm
from atlas_jax.train.telemetry import flops

# `score.token_stats_and_balance` as it is configured here.
_StatsFn = Callable[
  [decoder.Params, optimizer_step.Batch], tuple[logprobs.TokenStats, jax.Array]
]


class GrpoUpdate:
  """Turns rewarded records into updates."""

  def __init__(
    self,
    policy: trainable.Policy,
    optimizer: optax.GradientTransformation,
    *,
    shardings: Any,  # Any: a tree like the state's.
    mesh: jax.sharding.Mesh,
    config: Any,  # Any: a ConfigDict, whose values have no static type.
  ) -> None:
    """Compiles nothing yet.

    Args:
      policy: what is trained. Where it has a base, that is the reference.
      optimizer: clipping included.
      shardings: where the state stays, as `state.shardings` tells.
      mesh: as `sharding.make_mesh` makes it.
      config: sections `loss`, `advantages`, `correction`, `groups`, `batch`,
        `packing`, `reference`, `agreement`, `alarm`, `score`, `experts` and
        `sampling`.

    Raises:
      errors.ConfigError: if nothing could be learnt with them.
    """
    sampling = config.sampling.teach
    _check_sampling(sampling)
    _check_rows(config)
    score.check_balance(policy.model, **config.experts)
    self._objective = grpo.Objective(
      **config.loss, max_tokens=sampling.max_completion_tokens
    )
    self._is_penalised = (
      self._objective.kl_coef > 0 and self._objective.kl_in == "reward"
    )
    self._batch, self._reference = config.batch, config.reference
    self._filter_equal = config.groups.filter_equal
    self._group_size = sampling.group_size
    self._max_prob_error = config.agreement.max_prob_error
    self._alarm = alarm.Alarm(**config.alarm)
    self._rows = sharding.of_batch(mesh)
    self._lay_out = functools.partial(
      rollout_packing.lay_out,
      num_minibatches=config.batch.num_minibatches,
      num_shards=sharding.num_row_shards(mesh),
      max_completion_tokens=sampling.max_completion_tokens,
      per_device=config.batch.per_device,
      **config.packing,
    )
    token_stats = _token_stats(config)
    stats_fn = functools.partial(token_stats, policy.model)
    self._policy = policy
    self._score = self._score_reference = _scorer(stats_fn)
    if policy.frozen:
      self._score_reference = _scorer(
        functools.partial(token_stats, policy.base)
      )
    correct = functools.partial(correction.sampler_weights, **config.correction)
    loss_fn = functools.partial(
      _loss,
      policy.model,
      stats_fn,
      objective=self._objective,
      correct=correct,
      **config.experts,
    )
    self._step = optimizer_step.make_step(
      train_optimizer.freeze(loss_fn, config.optimizer.frozen),
      optimizer,
      frozen=policy.frozen,
      shardings=shardings,
    )
    self._advantages = jax.jit(
      functools.partial(advantages.group_advantages, **config.advantages)
    )
    self._divergences = jax.jit(
      functools.partial(
        kl.of_sequences, estimator=self._objective.kl_estimator
      ),
      out_shardings=sharding.replicated(mesh),
    )
    # Refuses their settings now, not after the first batch was sampled.
    number, flag = jnp.zeros((1, 1)), jnp.ones((1, 1), bool)
    jax.eval_shape(self._advantages, number, flag)
    jax.eval_shape(correct, number, number, flag)

  def update(
    self,
    state: train_state.TrainState,
    records: Sequence[types.TeachingRecord],
    rewarded: Sequence[types.Reward],
    *,
    is_compared: bool,
  ) -> tuple[train_state.TrainState, dict[str, Any]]:
    """Does the updates of one step; none if there is nothing to learn from.

    Trainer and sampler are measured where both had the same weights, and held
    to the bound if `is_compared`.

    Args:
      state: donated.
      records: group by group.
      rewarded: one for each; a missing one is no part of its group.
      is_compared: see above.

    Raises:
      errors.DivergedError: see `agreement.check` and `alarm.Alarm.check`.
    """
    step = int(state.step)
    rewards_PC, valid_PC = group_rewards(rewarded, self._group_size)
    keep = self._kept(records, rewards_PC, valid_PC)
    varied_P1 = advantages.has_variance(rewards_PC, valid_PC)
    rollouts = [records[i].teacher_rollout for i in keep]
    lengths = [*map(_num_tokens, rollouts)]
    metrics: dict[str, Any] = {
      "groups/used_fraction": float(jnp.mean(varied_P1)),
      "num_tokens": sum(lengths),
      "num_flops": self._batch.num_iterations
      * flops.of_update(
        self._policy.model.config,
        lengths,
        is_base_frozen=self._policy.adapters is not None,
      ),
    }
    if keep:
      parts = [self._scored(state, part) for part in self._lay_out(rollouts)]
      num_places = sum(part.batch["token_ids"].size for part in parts)
      metrics["padding_fraction"] = 1.0 - sum(lengths) / num_places
      self._add_advantages(parts, keep, rewards_PC, valid_PC)
      versions = {rollout.completion.version for rollout in rollouts}
      state, updated = self._fit(state, parts)
      measured = {k: updated.pop(k) for k in agreement.METRICS}
      if versions == {step}:
        metrics |= measured
        if is_compared:
          agreement.check(
            float(measured["rollout/prob_error"]),
            step=step,
            max_prob_error=self._max_prob_error,
          )
      metrics |= updated
    self._alarm.check(metrics, step=step + 1)
    return self._sync_reference(state), metrics

  def _kept(
    self,
    records: Sequence[types.TeachingRecord],
    rewards_PC: jax.Array,
    valid_PC: jax.Array,
  ) -> list[int]:
    """Chooses the records that are trained on.

    A group whose rewards are all equal has no advantage; if it is filtered out,
    it is no part of the loss's mean and of the divergence either.
    """
    kept_PC = valid_PC
    if self._filter_equal:
      kept_PC = valid_PC & advantages.has_variance(rewards_PC, valid_PC)
    return [
      i
      for i, kept in enumerate(np.ravel(kept_PC))
      if kept
      and not (
        self._batch.mask_truncated
        and records[i].teacher_rollout.completion.finish_reason == "length"
      )
    ]

  def _scored(
    self, state: train_state.TrainState, part: rollout_packing.Part
  ) -> rollout_packing.Part:
    """Adds what stays as it is through a step's updates.

    With one update a step the policy that is trained is the old one itself, and
    the update scores it.
    """
    batch, reference = sharding.put(part.batch, self._rows), state.reference
    num_updates = self._batch.num_minibatches * self._batch.num_iterations
    if num_updates > 1 or self._is_penalised:
      params = self._policy.all_params(state.params)
      batch["old_logprobs"] = self._score(params, batch, part.num_microbatches)
    if self._policy.frozen and self._objective.kl_coef:
      reference = self._policy.frozen  # The adapters are switched off.
    if reference is not None:
      batch["ref_logprobs"] = self._score_reference(
        reference, batch, part.num_microbatches
      )
    return part._replace(batch=batch)

  def _add_advantages(
    self,
    parts: Sequence[rollout_packing.Part],
    keep: Sequence[int],
    rewards_PC: jax.Array,
    valid_PC: jax.Array,
  ) -> None:
    """Adds the advantages to scored batches, 0 for rows of padding.

    Where the divergence counts in the reward, that of records which are not
    trained on is taken as 0.
    """
    if self._is_penalised:
      penalty_PC = np.zeros_like(rewards_PC)
      for part in parts:
        penalty_B = self._divergences(
          part.batch["old_logprobs"],
          part.batch["ref_logprobs"],
          part.batch["loss_mask"],
        )
        rollouts, places = zip(*part.members, strict=True)
        penalty_PC.flat[np.take(keep, rollouts)] = np.take(penalty_B, places)
      rewards_PC = rewards_PC - self._objective.kl_coef * penalty_PC
    advantages_PC = np.asarray(self._advantages(rewards_PC, valid_PC))
    for part in parts:
      rollouts, places = zip(*part.members, strict=True)
      advantages_B = np.zeros(len(part.batch["places"]), np.float32)
      advantages_B[list(places)] = advantages_PC.flat[np.take(keep, rollouts)]
      part.batch["advantages"] = sharding.put(advantages_B, self._rows)

  def _fit(
    self, state: train_state.TrainState, parts: Sequence[rollout_packing.Part]
  ) -> tuple[train_state.TrainState, dict[str, Any]]:
    """Updates on scored batches, one after the other."""
    collected = []
    for _ in range(self._batch.num_iterations):
      for part in parts:
        state, metrics = self._step(
          state, part.batch, num_microbatches=part.num_microbatches
        )
        collected.append(metrics)
    means = jax.tree.map(lambda *x: sum(x) / len(x), *collected)
    # Its value: the next update donates the array itself.
    means["num_nonfinite"] = int(state.num_nonfinite)
    return state, means

  def _sync_reference(
    self, state: train_state.TrainState
  ) -> train_state.TrainState:
    """Mixes the policy into the reference every `sync_every` steps.

    Source: Gorbatovski et al., arXiv:2404.09656, equations 4 and 5.
    """
    every, mix = self._reference.sync_every, self._reference.mix
    if state.reference is None or not every or (int(state.step) + 1) % every:
      return state

    def mixed(old: jax.Array, new: jax.Array) -> jax.Array:
      value = (1.0 - mix) * train_state.on_device(old) + mix * new
      return jax.device_put(value, old.sharding)

    reference = jax.tree.map(mixed, state.reference, state.params)
    return state._replace(reference=reference)


def group_rewards(
  rewarded: Sequence[types.Reward], group_size: int
) -> tuple[jax.Array, jax.Array]:
  """Lays rewards out by group: float32[P, C], and bool[P, C] for which exist.

  Raises:
    ValueError: if they are no whole groups.
  """
  if len(rewarded) % group_size:
    raise ValueError(
      f"{len(rewarded)} rewards are no whole groups of {group_size}."
    )
  values = [0.0 if r.value is None else r.value for r in rewarded]
  valid = [r.value is not None for r in rewarded]
  return (
    jnp.asarray(values, jnp.float32).reshape(-1, group_size),
    jnp.asarray(valid).reshape(-1, group_size),
  )


def count_varied(rewarded: Sequence[types.Reward], group_size: int) -> int:
  """Counts the groups that have something to teach: rewards that differ."""
  varied_P1 = advantages.has_variance(*group_rewards(rewarded, group_size))
  return int(varied_P1.sum())


def _check_rows(config: Any) -> None:  # Any: a ConfigDict.
  """Refuses sizes of rows and parts that there are not."""
  for name, value, least in (
    ("batch.per_device", config.batch.per_device, 0),
    ("batch.num_minibatches", config.batch.num_minibatches, 1),
    ("packing.length", config.packing.length, 0),
  ):
    if value < least:
      raise errors.ConfigError(
        "Rows cannot be laid out like this.",
        where=f"--config.{name}={value}",
        why=f"It counts something, and is {least} or more.",
        fix=f"Set it to {least}, or to more.",
      )


def _check_sampling(
  sampling: Any,  # Any: a ConfigDict, like `types.SamplingParams`.
) -> None:
  """Refuses sampling that nothing could be learnt from."""
  if sampling.temperature == 0:
    raise errors.ConfigError(
      "The policy must be sampled at a temperature.",
      where="--config.sampling.teach.temperature=0",
      why="What is drawn greedily has no importance ratio.",
      fix="Set it above 0, for example to 1.",
    )
  if sampling.group_size < 2:
    raise errors.ConfigError(
      "A group of one completion has nothing to be compared with.",
      where=f"--config.sampling.teach.group_size={sampling.group_size}",
      why="Its advantage is its reward less that of its group.",
      fix="Set it to 2 or more, for example 8.",
    )


def _token_stats(
  config: Any,  # Any: a ConfigDict.
) -> Callable[..., tuple[logprobs.TokenStats, jax.Array]]:
  """Configures `score.token_stats_and_balance` by how tokens are sampled."""
  sampling = config.sampling.teach
  cut = sampling.top_p < 1.0 or sampling.top_k > 0
  return functools.partial(
    score.token_stats_and_balance,
    temperature=sampling.temperature,
    chunk_tokens=config.logits.chunk_tokens,
    support=logprobs.Support(sampling.top_p, sampling.top_k) if cut else None,
  )


def _scorer(stats_fn: _StatsFn) -> Callable[..., jax.Array]:
  """Compiles `_logprobs`, for each number of microbatches."""
  return jax.jit(functools.partial(_logprobs, stats_fn), static_argnums=2)


def _logprobs(
  stats_fn: _StatsFn,
  params: decoder.Params,
  batch: optimizer_step.Batch,
  num_microbatches: int,
) -> jax.Array:
  """Scores the completions of a batch by the policy, or by the reference.

  One microbatch at a time, so that it takes less memory than an update does.
  """
  params = train_state.on_device(params)  # A reference may be offloaded.
  scores_RT = score.by_microbatches(
    lambda params, part: stats_fn(params, part)[0],
    *(params, batch, num_microbatches),
  )
  return rollout_packing.gather_scores(
    scores_RT, batch["places"], num_microbatches=num_microbatches
  )


def _loss(
  model: decoder.Model,
  stats_fn: _StatsFn,
  params: decoder.Params,
  batch: optimizer_step.Batch,
  *,
  objective: grpo.Objective,
  correct: Callable[..., jax.Array],
  router_aux_coef: float,
) -> tuple[jax.Array, tuple[jax.Array, optimizer_step.Metrics]]:
  """Computes the surrogate of a microbatch; see `optimizer_step.LossFn`.

  What is not scored yet is the policy's own, without a gradient.
  """
  packed, balance = stats_fn(params, batch)
  logprobs_BT, entropy_BT = (
    rollout_packing.gather_scores(scores, batch["places"], num_microbatches=1)
    for scores in (packed.logprobs, packed.entropy)
  )
  old_BT = batch.get("old_logprobs", jax.lax.stop_gradient(logprobs_BT))
  rollout_BT, mask_BT = batch["rollout_logprobs"], batch["loss_mask"]
  weights_BT = correct(old_BT, rollout_BT, mask_BT)
  loss, metrics = grpo.surrogate(
    logprobs_BT,
    old_BT,
    batch.get("ref_logprobs", old_BT),
    entropy_BT,
    batch["advantages"],
    mask_BT,
    rollout_weights_BT=weights_BT,
    objective=objective,
  )
  metrics |= agreement.measure(old_BT, rollout_BT, mask_BT)
  metrics["rollout/weight"] = reduce.token_mean(weights_BT, mask_BT)
  loss, metrics = score.add_balance(
    model, loss, metrics, balance, router_aux_coef=router_aux_coef
  )
  weight = reduce.count(mask_BT, aggregate=objective.aggregate)
  return loss, (weight, metrics)


def _num_tokens(rollout: types.Rollout) -> int:
  return len(rollout.prompt.token_ids) + len(rollout.completion.token_ids)
