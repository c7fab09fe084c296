# SPDX-License-Identifier: Apache-2.0
"""GRPO on the teaching protocol: the policy is the teacher.

One step: questions -> probe, teachings, answers -> reward -> advantages within
each group -> one token batch -> old and reference log-probabilities -> updates
on the clipped surrogate -> new weights for the sampler.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from atlas_jax import chat, checkpoint, errors, types
from atlas_jax.data import loader
from atlas_jax.evaluation import held_out as evaluation
from atlas_jax.evaluation import metrics
from atlas_jax.models import decoder
from atlas_jax.rewards import teaching as rewards
from atlas_jax.teaching import protocol as teaching_protocol
from atlas_jax.train import (
  grpo_batches,
  grpo_update,
  loop,
  schedule,
  train_state,
  trainable,
)
from atlas_jax.train import optimizer as train_optimizer
from atlas_jax.train.telemetry import clock as train_clock
from atlas_jax.train.telemetry import samples as train_samples
from atlas_jax.train.telemetry import writer as train_writer


def train(  # noqa: PLR0913 - one argument per collaborator.
  policy: trainable.Policy,
  params: decoder.Params,
  *,
  protocol: teaching_protocol.Rollouts,
  reward_fn: types.RewardFn,
  questions: loader.QuestionLoader,
  held_out: Sequence[types.Question],
  on_save: Callable[[decoder.Params, int], None],
  mesh: jax.sharding.Mesh,
  config: Any,  # Any: a ConfigDict, whose values have no static type.
  workdir: pathlib.Path,
  writer: train_writer.Writer,
  should_stop: Callable[[], bool],
) -> decoder.Params:
  """Trains the teacher, whose `params` it donates; returns them trained.

  Args:
    policy: what is trained. Where it has a base, that is the reference.
    params: of it, where to start; without a base, the first reference.
    protocol: samples probes, teachings and answers; its policy's sampler gets
      the new weights before every step.
    reward_fn: rewards the graded records of one step.
    questions: what is taught.
    held_out: what it is evaluated on; may be empty.
    on_save: called after each checkpoint, with the steps done.
    mesh: as `sharding.make_mesh` makes it.
    config: sections `optimizer`, `schedule`, `offload`, `loop`, `checkpoint`,
      `rollout` and `overlap`, and those of `learner.GrpoUpdate`; `seed`.
    workdir: holds checkpoints; trained from there if it has any.
    writer: takes the metrics.
    should_stop: asked after each step.

  Raises:
    errors.AtlasError: see `loop.run`, `grpo_batches.RolloutBatches` and
      `agreement.check`.
  """
  _check_sampling(config, mesh)
  _check_reference(policy, config)
  optimizer = _make_optimizer(config)
  state = _start(policy, params, optimizer, mesh=mesh, config=config)
  learner = grpo_update.GrpoUpdate(
    policy,
    optimizer,
    shardings=train_state.shardings(state),
    mesh=mesh,
    config=config,
  )
  collector = _make_collector(protocol, questions, config)
  checkpointer = checkpoint.Checkpointer(
    workdir / "checkpoints",
    identity={
      "data": questions.fingerprint(),
      "tokenizer": chat.fingerprint(protocol.policy.tokenizer),
      "student": config.student.path if "student" in config else "none",
      "optimizer": config.optimizer.name,
      **policy.identity(),
    },
    **config.checkpoint,
  )
  samples = train_samples.SampleLog(
    writer, protocol.policy.tokenizer, seed=config.seed, **config.samples
  )
  clock = train_clock.Clock()
  with collector:
    state = loop.run(
      state,
      loop.Task(
        _Step(
          policy,
          collector,
          reward_fn,
          learner,
          samples,
          clock,
          group_size=config.sampling.teach.group_size,
          max_refills=config.groups.max_refills,
        ),
        functools.partial(
          _evaluate, policy, collector, protocol, held_out, config
        ),
        on_save=lambda state, step: on_save(state.params, step),
        row_ids=collector.row_ids,
        clock=clock,
        get_host_state=collector.get_state,
        set_host_state=collector.set_state,
      ),
      loop.Settings(**config.loop),
      checkpointer=checkpointer,
      workdir=workdir,
      writer=writer,
      should_stop=should_stop,
    )
  return state.params


def _start(
  policy: trainable.Policy,
  params: decoder.Params,
  optimizer: optax.GradientTransformation,
  *,
  mesh: jax.sharding.Mesh,
  config: Any,  # Any: as in `train`.
) -> train_state.TrainState:
  """Starts at step 0, with a copy as reference if one is needed."""
  has_copy = needs_copy(policy, config)
  return train_state.create(
    params,
    optimizer,
    mesh=mesh,
    # The trainer donates its parameters, so the reference is a copy. It has no
    # name here, which would keep on the devices what is offloaded.
    reference=jax.tree.map(jnp.copy, params) if has_copy else None,
    offload=train_state.Offload(**config.offload),
  )


def needs_copy(
  policy: trainable.Policy,
  config: Any,  # Any: as in `train`.
) -> bool:
  """Tells whether the reference is a copy of where the policy starts."""
  return config.loss.kl_coef > 0 and not policy.frozen


def _evaluate(
  policy: trainable.Policy,
  collector: grpo_batches.RolloutBatches,
  protocol: teaching_protocol.Rollouts,
  held_out: Sequence[types.Question],
  config: Any,  # Any: as in `train`.
  state: train_state.TrainState,
  step: int,
) -> loop.Metrics:
  """Teaches held-out questions: see `loop.Evaluate`."""
  if not held_out:
    return {}
  collector.push(policy.merged_params(state.params), step)
  return evaluation.evaluate(
    protocol,
    held_out,
    seed=config.seed,
    num_bootstrap=config.evaluation.num_bootstrap,
    max_dropped_fraction=config.groups.max_dropped_fraction,
  )


@dataclasses.dataclass(frozen=True)
class _Step:
  """One step of the recipe; see `loop.Task`."""

  policy: trainable.Policy
  collector: grpo_batches.RolloutBatches
  reward_fn: types.RewardFn
  learner: grpo_update.GrpoUpdate
  samples: train_samples.SampleLog
  clock: train_clock.Clock
  group_size: int
  max_refills: int

  def __call__(
    self, state: train_state.TrainState, step: int
  ) -> tuple[train_state.TrainState, loop.Metrics]:
    """Samples, rewards, samples again what teaches nothing, and updates."""
    collector = self.collector
    collector.settle()
    with self.clock.phase("push"):
      collector.push(self.policy.merged_params(state.params), step)
    records, sampled = collector.take(step, self.clock)
    records, rewarded = self._reward(records)
    num_wanted, num_refills = len(collector.row_ids(step)), 0
    while num_refills < self.max_refills:
      missing = num_wanted - grpo_update.count_varied(rewarded, self.group_size)
      more = collector.refill(
        step, records, num_questions=missing, clock=self.clock
      )
      if not more:
        break
      more, more_rewarded = self._reward(more)
      records, rewarded = records + more, rewarded + more_rewarded
      num_refills += 1
    rewarded, lag = collector.drop_stale(records, rewarded, step)
    with self.clock.phase("train"):
      state, metrics = self.learner.update(
        state, records, rewarded, is_compared=collector.is_compared(step)
      )
    with self.clock.phase("save"):
      self.samples.save(step + 1, records, rewarded)
    described = {**_describe(records, rewarded), "groups/refills": num_refills}
    measured = {**lag, **collector.take_metrics(), **sampled}
    return state, {**described, **metrics, **measured}

  def _reward(
    self, records: Sequence[types.TeachingRecord]
  ) -> tuple[list[types.TeachingRecord], list[types.Reward]]:
    """Grades the answers, then rewards the teachings."""
    with self.clock.phase("reward"):
      graded = [rewards.grade(record) for record in records]
      return graded, self.reward_fn(graded)


def _make_optimizer(
  config: Any,  # Any: as in `train`.
) -> optax.GradientTransformation:
  """Makes the optimizer, with a schedule over all updates of all steps."""
  updates = config.batch.num_iterations * config.batch.num_minibatches
  rate = schedule.make(
    **config.schedule, num_updates=config.loop.num_steps * updates
  )
  return train_optimizer.make_optimizer(rate, **config.optimizer)


def _make_collector(
  protocol: teaching_protocol.Rollouts,
  questions: loader.QuestionLoader,
  config: Any,  # Any: as in `train`.
) -> grpo_batches.RolloutBatches:
  """Makes what samples the batch of each step."""
  return grpo_batches.RolloutBatches(
    protocol,
    questions,
    seed=config.seed,
    num_steps=config.loop.num_steps,
    max_staleness=config.overlap.max_staleness,
    compare_every=config.agreement.every_steps,
    max_dropped_fraction=config.groups.max_dropped_fraction,
  )


def _check_sampling(
  config: Any,  # Any: as in `train`.
  mesh: jax.sharding.Mesh,
) -> None:
  """Refuses what would hang, or be ignored."""
  if config.groups.max_refills and not config.groups.filter_equal:
    raise errors.ConfigError(
      "Groups are made up for that are not left out.",
      where=f"--config.groups.max_refills={config.groups.max_refills}",
      why="The batch would grow with every group that teaches nothing.",
      fix="Set filter_equal=True, or max_refills to 0.",
    )
  if not 0.0 <= config.groups.max_dropped_fraction < 1.0:
    raise errors.ConfigError(
      "There is no such fraction of a batch to go on without.",
      where="--config.groups.max_dropped_fraction="
      f"{config.groups.max_dropped_fraction}",
      why="It is 0 or more, and below 1: something must be left.",
      fix="Set it to 0.25, for example.",
    )
  if (
    config.overlap.max_staleness
    and config.rollout.backend == "jax"
    and mesh.size > 1
  ):
    raise errors.ConfigError(
      "A mesh of several devices cannot sample and train at once.",
      where=f"--config.overlap.max_staleness={config.overlap.max_staleness}",
      why="Two threads would order their collectives differently, and hang.",
      fix="Sample from servers (scripts/launch_with_server.sh), or set it to "
      "0.",
    )


def _check_reference(
  policy: trainable.Policy,
  config: Any,  # Any: as in `train`.
) -> None:
  """Refuses to sync a reference that cannot move."""
  if policy.frozen and config.loss.kl_coef and config.reference.sync_every:
    raise errors.ConfigError(
      "The reference of adapters cannot follow the policy.",
      where=f"--config.reference.sync_every={config.reference.sync_every}",
      why="It is the base model, which stays as it is.",
      fix="Set it to 0, or train all parameters: --config.lora.rank=0.",
    )


def _describe(
  records: Sequence[types.TeachingRecord], rewarded: Sequence[types.Reward]
) -> dict[str, float]:
  """Averages what the records and their rewards say."""
  values = [r.value for r in rewarded if r.value is not None]
  parts = [r.parts for r in rewarded if r.value is not None]
  names = dict.fromkeys(name for part in parts for name in part)
  completions = [r.teacher_rollout.completion for r in records]
  answers = metrics.of_answers(records, num_bootstrap=0, seed=0)
  # Where every reward is missing there is no mean, and none is made up.
  rewards_seen = (
    {"reward": float(np.mean(values)), "reward_std": float(np.std(values))}
    if values
    else {}
  )
  return {
    **rewards_seen,
    "rewards/unavailable": len(rewarded) - len(values),
    **{
      f"rewards/{n}": float(np.mean([p.get(n, 0.0) for p in parts]))
      for n in names
    },
    "completion_length": float(
      np.mean([len(c.token_ids) for c in completions])
    ),
    "truncated_fraction": float(
      np.mean([c.finish_reason == "length" for c in completions])
    ),
    **{k: v for k, v in answers.items() if isinstance(v, float)},
  }
