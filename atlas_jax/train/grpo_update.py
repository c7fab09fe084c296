# SPDX-License-Identifier: Apache-2.0
"""Updates the policy from rewarded records: the training half of a GRPO step.

rewards -> group advantages -> packed batches -> old and reference
log-probabilities -> gradient steps on the clipped surrogate.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from atlas_jax import errors, sharding, types
from atlas_jax.losses import advantages, correction, grpo, kl, logprobs, reduce
from atlas_jax.models import decoder
from atlas_jax.train import (
  batch_shapes,
  optimizer_step,
  rollout_packing,
  score,
  train_state,
  trainable,
)
from atlas_jax.train import optimizer as train_optimizer
from atlas_jax.train.guards import agreement, alarm
from atlas_jax.train.telemetry import flops

# `score.token_stats_and_balance` with the settings of a run.
_StatsFn = Callable[
  [decoder.Params, optimizer_step.Batch], tuple[logprobs.TokenStats, jax.Array]
]


@dataclasses.dataclass(frozen=True)
class _Programs:
  """The jitted functions of an update."""

  score: Callable[..., jax.Array]
  score_reference: Callable[..., jax.Array]
  step: optimizer_step.Step
  advantages: Callable[[jax.Array, jax.Array], jax.Array]
  divergences: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class GrpoUpdate:
  """Computes advantages and log-probabilities of records, and updates."""

  def __init__(
    self,
    policy: trainable.Policy,
    optimizer: optax.GradientTransformation,
    *,
    shardings: Any,  # Any: a tree like the state's.
    mesh: jax.sharding.Mesh,
    config: types.Config,
  ) -> None:
    """Validates the config; programs are compiled at their first call.

    Args:
      policy: the model to train. If it has a frozen base, that is the
        reference.
      optimizer: with gradient clipping.
      shardings: of the train state, from `train_state.shardings`.
      mesh: see `sharding.make_mesh`.
      config: sections `loss`, `advantages`, `correction`, `groups`, `batch`,
        `packing`, `reference`, `agreement`, `alarm`, `logits`, `experts`,
        `sampling` and `roles`.

    Raises:
      errors.ConfigError: if a setting is invalid, or leaves nothing to train
        on.
    """
    sampling = config.sampling.teach
    _check_sampling(sampling)
    score.check_balance(policy.model, **config.experts)
    self._policy, self._config = policy, config
    self._objective = grpo.Objective(
      **config.loss, max_tokens=sampling.max_completion_tokens
    )
    self._penalizes_reward = (
      self._objective.kl_coef > 0 and self._objective.kl_in == "reward"
    )
    self._alarm = alarm.Alarm(**config.alarm)
    self._rows = sharding.of_batch(mesh)
    limit = policy.model.config.max_positions
    shapes = batch_shapes.of_grpo(config, mesh, max_positions=limit)
    shapes.log()
    self._pack = functools.partial(
      rollout_packing.lay_out,
      layout=shapes,
      max_completion_tokens=sampling.max_completion_tokens,
    )
    self._programs = _programs(
      policy,
      optimizer,
      self._objective,
      shardings=shardings,
      mesh=mesh,
      config=config,
    )

  def update(
    self,
    state: train_state.TrainState,
    records: Sequence[types.TeachingRecord],
    rewarded: Sequence[types.Reward],
    *,
    is_compared: bool,
  ) -> tuple[train_state.TrainState, dict[str, Any]]:
    """Performs the updates of one step; none if no record can be trained on.

    The agreement of trainer and sampler is measured if both had the same
    weights, and checked against its bound if `is_compared`.

    Args:
      state: donated.
      records: in whole groups, group by group.
      rewarded: one reward per record; a missing one leaves its group.
      is_compared: see above.

    Raises:
      errors.DivergedError: see `agreement.check` and `alarm.Alarm.check`.
    """
    config = self._config
    step = int(state.step)
    size = config.sampling.teach.group_size
    rewards_PC, valid_PC = group_rewards(rewarded, size)
    keep = self._kept(records, rewards_PC, valid_PC)
    rollouts = [records[i].teacher_rollout for i in keep]
    lengths = [
      len(r.prompt.token_ids) + len(r.completion.token_ids) for r in rollouts
    ]
    metrics: dict[str, Any] = {
      **_group_metrics(keep, rewards_PC, valid_PC),
      "num_tokens": sum(lengths),
      "num_flops": config.batch.num_iterations
      * flops.of_update(
        self._policy.model.config,
        lengths,
        is_base_frozen=self._policy.adapters is not None,
      ),
    }
    if keep:
      parts = [self._scored(state, part) for part in self._pack(rollouts)]
      num_computed = sum(part.num_computed for part in parts)
      metrics["padding_fraction"] = 1.0 - sum(lengths) / num_computed
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
            max_prob_error=config.agreement.max_prob_error,
          )
      metrics |= updated
    self._alarm.check(metrics, records, rewarded, step=step + 1)
    return self._sync_reference(state), metrics

  def _kept(
    self,
    records: Sequence[types.TeachingRecord],
    rewards_PC: jax.Array,
    valid_PC: jax.Array,
  ) -> list[int]:
    """Returns the indices of the records to train on.

    A group of equal rewards has zero advantages. If such groups are filtered,
    they do not count in the mean of the loss and of the KL either.
    """
    groups, batch = self._config.groups, self._config.batch
    kept_PC = valid_PC
    if groups.filter_equal:
      kept_PC = valid_PC & advantages.has_variance(rewards_PC, valid_PC)
    return [
      i
      for i, kept in enumerate(np.ravel(kept_PC))
      if kept
      and not (
        batch.mask_truncated
        and records[i].teacher_rollout.completion.finish_reason == "length"
      )
    ]

  def _scored(
    self, state: train_state.TrainState, part: rollout_packing.Part
  ) -> rollout_packing.Part:
    """Adds the log-probabilities that stay fixed during a step's updates.

    With a single update per step the trained policy is the old policy, and the
    update itself computes the old log-probabilities.
    """
    config, programs = self._config, self._programs
    batch, reference = sharding.put(part.batch, self._rows), state.reference
    scores = {}
    num_updates = config.batch.num_minibatches * config.batch.num_iterations
    counts = part.num_used, part.num_microbatches
    if num_updates > 1 or self._penalizes_reward:
      params = self._policy.all_params(state.params)
      scores["old_logprobs"] = programs.score(params, batch, *counts)
    if self._policy.frozen and self._objective.kl_coef:
      reference = self._policy.frozen  # The model without its adapters.
    if reference is not None:
      scores["ref_logprobs"] = programs.score_reference(
        reference, batch, *counts
      )
    # Added last: other arrays in the batch would compile another program.
    batch["completions"] |= scores
    return part._replace(batch=batch)

  def _add_advantages(
    self,
    parts: Sequence[rollout_packing.Part],
    keep: Sequence[int],
    rewards_PC: jax.Array,
    valid_PC: jax.Array,
  ) -> None:
    """Adds `advantages` to scored completions; padding rows get 0.

    If the KL is part of the reward, records that are not trained on have none
    measured and count as 0.
    """
    if self._penalizes_reward:
      penalty_PC = np.zeros_like(rewards_PC)
      for part in parts:
        completions = part.batch["completions"]
        penalty_B = self._programs.divergences(
          completions["old_logprobs"],
          completions["ref_logprobs"],
          completions["places"],
        )
        kept = np.take(keep, part.indices)
        penalty_PC.flat[kept] = np.asarray(penalty_B)[: len(kept)]
      rewards_PC = rewards_PC - self._objective.kl_coef * penalty_PC
    advantages_PC = np.asarray(self._programs.advantages(rewards_PC, valid_PC))
    for part in parts:
      completions = part.batch["completions"]
      advantages_B = np.zeros(len(completions["places"]), np.float32)
      # Rollout i of the step is record keep[i].
      kept = np.take(keep, part.indices)
      advantages_B[: len(kept)] = advantages_PC.flat[kept]
      completions["advantages"] = sharding.put(advantages_B, self._rows)

  def _fit(
    self, state: train_state.TrainState, parts: Sequence[rollout_packing.Part]
  ) -> tuple[train_state.TrainState, dict[str, Any]]:
    """Updates on scored batches, one after another."""
    collected = []
    for _ in range(self._config.batch.num_iterations):
      for part in parts:
        state, metrics = self._programs.step(
          state,
          part.batch,
          part.num_used,
          num_microbatches=part.num_microbatches,
        )
        collected.append(metrics)
    combined = {
      name: optimizer_step.combine(name, [m[name] for m in collected])
      for name in collected[0]
    }
    # As an int: the next update donates the array.
    combined["num_nonfinite"] = int(state.num_nonfinite)
    return state, combined

  def _sync_reference(
    self, state: train_state.TrainState
  ) -> train_state.TrainState:
    """Mixes the policy into the reference every `sync_every` steps.

    Source: Gorbatovski et al., arXiv:2404.09656, equations 4 and 5.
    """
    every, mix = self._config.reference.sync_every, self._config.reference.mix
    if state.reference is None or not every or (int(state.step) + 1) % every:
      return state

    def mixed(old: jax.Array, new: jax.Array) -> jax.Array:
      was = train_state.on_device(old).astype(jnp.float32)
      value = (1.0 - mix) * was + mix * new.astype(jnp.float32)
      return jax.device_put(value.astype(old.dtype), old.sharding)

    reference = jax.tree.map(mixed, state.reference, state.params)
    return state._replace(reference=reference)


def group_rewards(
  rewarded: Sequence[types.Reward], group_size: int
) -> tuple[jax.Array, jax.Array]:
  """Returns rewards by group, float32[P, C], and their validity, bool[P, C].

  Raises:
    ValueError: if the rewards do not form whole groups.
  """
  if len(rewarded) % group_size:
    raise ValueError(
      f"{len(rewarded)} rewards do not form whole groups of {group_size}."
    )
  values = [0.0 if r.value is None else r.value for r in rewarded]
  valid = [r.value is not None for r in rewarded]
  return (
    jnp.asarray(values, jnp.float32).reshape(-1, group_size),
    jnp.asarray(valid).reshape(-1, group_size),
  )


def _group_metrics(
  keep: Sequence[int], rewards_PC: jax.Array, valid_PC: jax.Array
) -> dict[str, float]:
  """Returns the fractions of groups with a learning signal, and without.

  A group is used if its rewards differ and one of its records is trained on.
  """
  varied_P = np.ravel(advantages.has_variance(rewards_PC, valid_PC))
  kept_P = np.isin(np.arange(rewards_PC.size), keep).reshape(valid_PC.shape)
  used_P = varied_P & kept_P.any(axis=1)
  return {
    "groups/used_fraction": float(used_P.mean()),
    "groups/truncated_fraction": float((varied_P & ~used_P).mean()),
  }


def count_varied(rewarded: Sequence[types.Reward], group_size: int) -> int:
  """Returns the number of groups whose rewards differ."""
  varied_P1 = advantages.has_variance(*group_rewards(rewarded, group_size))
  return int(varied_P1.sum())


def _check_sampling(sampling: types.Config) -> None:
  """Rejects sampling without an importance ratio or without a group."""
  if sampling.temperature == 0:
    raise errors.ConfigError(
      "GRPO requires sampling.teach.temperature > 0.",
      where="--config.sampling.teach.temperature=0",
      why="Greedy completions have no importance ratio.",
      fix="Set it above 0, for example to 1.",
    )
  if sampling.group_size < 2:
    raise errors.ConfigError(
      "GRPO requires sampling.teach.group_size >= 2, got "
      f"{sampling.group_size}.",
      where=f"--config.sampling.teach.group_size={sampling.group_size}",
      why="An advantage is a reward minus the mean of its group.",
      fix="Set it to 2 or more, for example 8.",
    )


def _programs(
  policy: trainable.Policy,
  optimizer: optax.GradientTransformation,
  objective: grpo.Objective,
  *,
  shardings: Any,  # Any: a tree like the state's.
  mesh: jax.sharding.Mesh,
  config: types.Config,
) -> _Programs:
  """Defines the jitted functions and traces those that validate settings."""
  token_stats = _token_stats(config)
  stats_fn = functools.partial(token_stats, policy.model)
  score_policy = score_reference = _scorer(stats_fn, mesh)
  if policy.frozen:
    score_reference = _scorer(functools.partial(token_stats, policy.base), mesh)
  correct = functools.partial(correction.sampler_weights, **config.correction)
  loss_fn = functools.partial(
    _loss,
    policy.model,
    stats_fn,
    objective=objective,
    correct=correct,
    weights_over=reduce.over(config.correction.level),
    **config.experts,
  )
  step = optimizer_step.make_step(
    train_optimizer.freeze(loss_fn, config.optimizer.frozen),
    optimizer,
    frozen=policy.frozen,
    shardings=shardings,
  )
  group_advantages = jax.jit(
    functools.partial(advantages.group_advantages, **config.advantages)
  )
  divergences = jax.jit(
    lambda old_BT, ref_BT, places_BT: kl.of_sequences(
      old_BT, ref_BT, places_BT >= 0, estimator=objective.kl_estimator
    ),
    out_shardings=sharding.replicated(mesh),
  )
  # Invalid settings raise here instead of after the first batch is sampled.
  number, flag = jnp.zeros((1, 1)), jnp.ones((1, 1), bool)
  jax.eval_shape(group_advantages, number, flag)
  jax.eval_shape(correct, number, number, flag)
  return _Programs(
    score_policy, score_reference, step, group_advantages, divergences
  )


def _token_stats(
  config: types.Config,
) -> Callable[..., tuple[logprobs.TokenStats, jax.Array]]:
  """Configures `score.token_stats_and_balance` to match the sampling."""
  sampling = config.sampling.teach
  cut = sampling.top_p < 1.0 or sampling.top_k > 0
  return functools.partial(
    score.token_stats_and_balance,
    temperature=sampling.temperature,
    chunk_tokens=config.logits.chunk_tokens,
    support=logprobs.Support(sampling.top_p, sampling.top_k) if cut else None,
  )


def _scorer(
  stats_fn: _StatsFn, mesh: jax.sharding.Mesh
) -> Callable[..., jax.Array]:
  """Jits `_logprobs`; its result is sharded like the batch."""
  return jax.jit(
    functools.partial(_logprobs, stats_fn),
    static_argnums=3,
    out_shardings=sharding.of_batch(mesh),
  )


def _logprobs(
  stats_fn: _StatsFn,
  params: decoder.Params,
  batch: optimizer_step.Batch,
  num_used: jax.Array,
  num_microbatches: int,
) -> jax.Array:
  """Returns the log-probabilities of completions, float32[B, C].

  It scores one microbatch at a time, to use less memory than an update.
  """
  params = train_state.on_device(params)  # A reference may be offloaded.
  places_BC = batch["completions"]["places"]

  def of_microbatch(
    part: optimizer_step.Batch,
  ) -> tuple[jax.Array, jax.Array, optimizer_step.Metrics]:
    scores_RT = stats_fn(params, part)[0].logprobs
    scores_BC, _ = rollout_packing.gather_scores(
      scores_RT, places_BC, part["index"]
    )
    return scores_BC, jnp.zeros(()), {}

  return optimizer_step.accumulate(
    of_microbatch, batch, num_used, num_microbatches=num_microbatches
  )[0]


def _loss(
  model: decoder.Model,
  stats_fn: _StatsFn,
  params: decoder.Params,
  batch: optimizer_step.Batch,
  *,
  objective: grpo.Objective,
  correct: Callable[..., jax.Array],
  weights_over: Callable[..., reduce.Mean],
  router_aux_coef: float,
) -> tuple[jax.Array, tuple[jax.Array, optimizer_step.Metrics]]:
  """Computes the surrogate of a microbatch; see `optimizer_step.LossFn`.

  Old log-probabilities missing from the batch are the policy's own, without a
  gradient.
  """
  packed, balance = stats_fn(params, batch)
  completions = batch["completions"]
  (logprobs_BT, mask_BT), (entropy_BT, _) = (
    rollout_packing.gather_scores(scores, completions["places"], batch["index"])
    for scores in (packed.logprobs, packed.entropy)
  )
  own_BT = jax.lax.stop_gradient(logprobs_BT)
  old_BT = completions.get("old_logprobs", own_BT)
  rollout_BT = completions["rollout_logprobs"]
  weights_BT = correct(old_BT, rollout_BT, mask_BT)
  loss, metrics = grpo.surrogate(
    logprobs_BT,
    old_BT,
    completions.get("ref_logprobs"),
    entropy_BT,
    completions["advantages"],
    mask_BT,
    rollout_weights_BT=weights_BT,
    objective=objective,
  )
  metrics |= agreement.measure(old_BT, rollout_BT, mask_BT)
  metrics["rollout/weight"] = weights_over(weights_BT, mask_BT)
  loss, metrics = score.add_balance(
    model, loss, metrics, balance, router_aux_coef=router_aux_coef
  )
  weight = reduce.count(mask_BT, aggregate=objective.aggregate)
  return loss, (weight, metrics)
