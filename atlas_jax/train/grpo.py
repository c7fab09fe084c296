# SPDX-License-Identifier: Apache-2.0
"""GRPO on the teaching protocol: the policy is the teacher.

One step: questions -> probes, teachings, answers -> reward -> advantages within
each group -> packed token batches -> old and reference log-probabilities ->
updates on the clipped surrogate -> new weights for the sampler.

`GrpoStep` is that step; docs/grpo_step.md lists the files it runs through.
"""

from collections.abc import Sequence
import dataclasses
import functools

import jax
import numpy as np

from atlas_jax import chat, errors, types
from atlas_jax.data import loader
from atlas_jax.evaluation import held_out as held_out_evaluation
from atlas_jax.evaluation import metrics
from atlas_jax.models import decoder
from atlas_jax.rewards import grading
from atlas_jax.teaching import protocol as teaching_protocol
from atlas_jax.train import (
  dry_pass,
  grpo_batches,
  grpo_update,
  loop,
  train_state,
  trainable,
)
from atlas_jax.train.telemetry import clock as train_clock
from atlas_jax.train.telemetry import samples as train_samples

_Rewarded = tuple[list[types.TeachingRecord], list[types.Reward]]


@dataclasses.dataclass(frozen=True)
class GrpoStep:
  """One GRPO step; see `loop.Task.do_step`.

  Attributes:
    policy: the teacher model and which of its parameters are trained.
    batches: samples the records of each step.
    grader: grades the answers.
    reward_fn: rewards graded records.
    updater: computes advantages and losses, and updates the parameters.
    samples: writes some of the sampled texts to files.
    clock: splits the time of the step into phases.
    group_size: teachings per question.
    max_refills: how often to sample further questions in place of groups whose
      rewards are all equal; 0 never does.
    dry_pass: runs before the first step, with its weights; None for no pass.
  """

  policy: trainable.Policy
  batches: grpo_batches.RolloutBatches
  grader: grading.Grader
  reward_fn: types.RewardFn
  updater: grpo_update.GrpoUpdate
  samples: train_samples.SampleLog
  clock: train_clock.Clock
  group_size: int
  max_refills: int
  dry_pass: dry_pass.DryPass | None

  def __call__(
    self, state: train_state.TrainState, step: int
  ) -> tuple[train_state.TrainState, loop.Metrics]:
    """Pushes weights, samples, rewards and updates."""
    self.batches.settle()
    with self.clock.phase("push"):
      self.batches.push(self.policy.merged_params(state.params), step)
    if self.dry_pass and step == 0:
      with self.clock.phase("dry_pass"):
        self.dry_pass()
    records, sampled = self.batches.take(step, self.clock)
    records, rewarded = self._reward(records)
    records, rewarded, num_refills = self._refill(step, records, rewarded)
    rewarded, lag = self.batches.drop_stale(records, rewarded, step)
    with self.clock.phase("train"):
      state, updated = self.updater.update(
        state, records, rewarded, is_compared=self.batches.is_compared(step)
      )
    with self.clock.phase("save"):
      self.samples.save(step + 1, records, rewarded)
    return state, {
      **_record_metrics(records, rewarded),
      "rewards/grading_failures": self.grader.take_num_failures(),
      "groups/refills": num_refills,
      **updated,
      **lag,
      **self.batches.take_metrics(),
      **sampled,
    }

  def _reward(self, records: Sequence[types.TeachingRecord]) -> _Rewarded:
    """Grades the answers, then rewards the teachings."""
    with self.clock.phase("reward"):
      graded = self.grader.grade(records)
      self.batches.keep_baselines(graded)
      return graded, self.reward_fn(graded)

  def _refill(
    self,
    step: int,
    records: list[types.TeachingRecord],
    rewarded: list[types.Reward],
  ) -> tuple[list[types.TeachingRecord], list[types.Reward], int]:
    """Samples further questions until enough groups have varied rewards.

    Source: Yu et al., arXiv:2503.14476, section 3.2, dynamic sampling.
    """
    num_wanted = len(self.batches.row_ids(step))
    for num_refills in range(self.max_refills):
      varied = grpo_update.count_varied(rewarded, self.group_size)
      more = self.batches.refill(
        step, records, num_questions=num_wanted - varied, clock=self.clock
      )
      if not more:
        return records, rewarded, num_refills
      more, more_rewarded = self._reward(more)
      records, rewarded = records + more, rewarded + more_rewarded
    return records, rewarded, self.max_refills


def train(  # noqa: PLR0913 - one argument per collaborator.
  policy: trainable.Policy,
  params: decoder.Params,
  *,
  protocol: teaching_protocol.Rollouts,
  grader: grading.Grader,
  reward_fn: types.RewardFn,
  questions: loader.QuestionLoader,
  held_out: Sequence[types.Question],
  evaluation: teaching_protocol.Rollouts,
  mesh: jax.sharding.Mesh,
  config: types.Config,
  run: loop.Run,
) -> decoder.Params:
  """Trains the teacher's `params`, which are donated, and returns them trained.

  Args:
    policy: the teacher. If it has a frozen base, that is the reference.
    params: its initial trained parameters; without a frozen base, a copy of
      them is the first reference.
    protocol: samples probes, teachings and answers; its policy's sampler
      receives the new weights before every step.
    grader: grades the answers, also of held-out questions.
    reward_fn: rewards the graded records of one step.
    questions: the training questions.
    held_out: questions to evaluate on; may be empty.
    evaluation: samples their records, with the samplers of `protocol`.
    mesh: see `sharding.make_mesh`.
    config: sections `optimizer`, `schedule`, `offload`, `loop`, `checkpoint`,
      `rollout` and `overlap`, those of `grpo_update.GrpoUpdate`, `seed` and
      `dry_pass`.
    run: where metrics and checkpoints go.

  Raises:
    errors.AtlasError: see `loop.train`, `grpo_batches.RolloutBatches` and
      `agreement.check`.
  """
  _check_sampling(config, mesh)
  _check_reference(policy, config)
  rate, optimizer, state = train_state.start(
    params,
    config,
    num_steps=config.loop.num_steps,
    mesh=mesh,
    # A copy, since updates donate the parameters. It is not bound to a name,
    # which would keep an offloaded copy alive on the devices.
    reference=train_state.copied(params, config.reference.dtype)
    if needs_copy(policy, config)
    else None,
  )
  updater = grpo_update.GrpoUpdate(
    policy,
    optimizer,
    shardings=train_state.shardings(state),
    mesh=mesh,
    config=config,
  )
  samples = train_samples.SampleLog(
    run.writer, seed=config.seed, **config.samples
  )
  rehearsal = dry_pass.DryPass(
    evaluation,
    grader,
    reward_fn,
    questions.batch(0)[0],
    config.seed,
    run.writer,
  )
  clock = train_clock.Clock()
  with _open_batches(protocol, questions, config) as batches:
    task = loop.Task(
      GrpoStep(
        policy,
        batches,
        grader,
        reward_fn,
        updater,
        samples,
        clock,
        group_size=config.sampling.teach.group_size,
        max_refills=config.groups.max_refills,
        dry_pass=rehearsal if config.dry_pass else None,
      ),
      functools.partial(
        _evaluate, policy, batches, evaluation, grader, held_out, config
      ),
      rate,
      row_ids=batches.row_ids,
      clock=clock,
      get_host_state=batches.get_state,
      set_host_state=batches.set_state,
    )
    state = loop.train(
      state,
      task,
      config,
      run,
      num_steps=config.loop.num_steps,
      identity={
        "data": questions.fingerprint(),
        "tokenizer": chat.fingerprint(protocol.policy.tokenizer),
        "student": config.student.path if "student" in config else "none",
        "optimizer": config.optimizer.name,
        **policy.identity(),
      },
    )
  return state.params


def needs_copy(policy: trainable.Policy, config: types.Config) -> bool:
  """Returns whether the reference needs its own copy of the parameters."""
  return config.loss.kl_coef > 0 and not policy.frozen


def _open_batches(
  protocol: teaching_protocol.Rollouts,
  questions: loader.QuestionLoader,
  config: types.Config,
) -> grpo_batches.RolloutBatches:
  """Creates the source of each step's records."""
  return grpo_batches.RolloutBatches(
    protocol,
    questions,
    seed=config.seed,
    num_steps=config.loop.num_steps,
    max_staleness=config.overlap.max_staleness,
    compare_every=config.agreement.every_steps,
    max_dropped_fraction=config.groups.max_dropped_fraction,
  )


def _evaluate(
  policy: trainable.Policy,
  batches: grpo_batches.RolloutBatches,
  evaluation: teaching_protocol.Rollouts,
  grader: grading.Grader,
  held_out: Sequence[types.Question],
  config: types.Config,
  state: train_state.TrainState,
  step: int,
) -> loop.Metrics:
  """Teaches the held-out questions; see `loop.Evaluate`."""
  if not held_out:
    return {}
  batches.push(policy.merged_params(state.params), step)
  return held_out_evaluation.evaluate(
    evaluation,
    held_out,
    grader=grader,
    seed=config.seed + 1,  # The baselines have the seed `config.seed`.
    num_bootstrap=config.evaluation.num_bootstrap,
    max_dropped_fraction=config.groups.max_dropped_fraction,
  )


def _record_metrics(
  records: Sequence[types.TeachingRecord], rewarded: Sequence[types.Reward]
) -> dict[str, float]:
  """Averages rewards, lengths and accuracies over the records of a step."""
  values = [r.value for r in rewarded if r.value is not None]
  parts = [r.parts for r in rewarded if r.value is not None]
  names = dict.fromkeys(name for part in parts for name in part)
  completions = [r.teacher_rollout.completion for r in records]
  lengths = [len(c.token_ids) for c in completions]
  truncated = [c.finish_reason == "length" for c in completions]
  answers = metrics.of_answers(records, num_bootstrap=0, seed=0)
  # The mean is undefined, and left out, if every reward is missing.
  reward_metrics = (
    {"reward": float(np.mean(values)), "reward_std": float(np.std(values))}
    if values
    else {}
  )
  return {
    **reward_metrics,
    "rewards/unavailable": len(rewarded) - len(values),
    **{
      f"rewards/{n}": float(np.mean([p.get(n, 0.0) for p in parts]))
      for n in names
    },
    "completion_length": float(np.mean(lengths)),
    "truncated_fraction": float(np.mean(truncated)),
    **{k: v for k, v in answers.items() if isinstance(v, float)},
  }


def _check_sampling(config: types.Config, mesh: jax.sharding.Mesh) -> None:
  """Rejects settings that would hang or be ignored."""
  groups, overlap = config.groups, config.overlap
  if groups.max_refills and not groups.filter_equal:
    raise errors.ConfigError(
      "max_refills requires filter_equal=True.",
      where=f"--config.groups.max_refills={groups.max_refills}",
      why="Refills replace filtered groups; without a filter the batch would "
      "only grow.",
      fix="Set --config.groups.filter_equal=True, or max_refills=0.",
    )
  if not 0.0 <= groups.max_dropped_fraction < 1.0:
    raise errors.ConfigError(
      "max_dropped_fraction must be in [0, 1), got "
      f"{groups.max_dropped_fraction}.",
      where="--config.groups.max_dropped_fraction",
      why="It is the fraction of a batch's questions that may be missing.",
      fix="Set it to 0.25, for example.",
    )
  if (
    overlap.max_staleness and config.rollout.backend == "jax" and mesh.size > 1
  ):
    raise errors.ConfigError(
      "max_staleness=1 requires rollout servers on a mesh of several devices.",
      where=f"--config.overlap.max_staleness={overlap.max_staleness}",
      why="Sampling and training from two threads would order their "
      "collectives differently and hang.",
      fix="Use scripts/launch_with_server.sh, or set max_staleness=0.",
    )


def _check_reference(policy: trainable.Policy, config: types.Config) -> None:
  """Rejects settings of a reference that is the frozen base, or missing."""
  dtype = config.reference.dtype
  if dtype and (dtype != "bfloat16" or not needs_copy(policy, config)):
    raise errors.ConfigError(
      "reference.dtype must be '' or bfloat16, and '' without a copy.",
      where=f"--config.reference.dtype={dtype}",
      why="With adapters the reference is the base model, and with "
      "loss.kl_coef=0 no reference is used.",
      fix="Set it to ''.",
    )
  if policy.frozen and config.loss.kl_coef and config.reference.sync_every:
    raise errors.ConfigError(
      "reference.sync_every requires training all parameters.",
      where=f"--config.reference.sync_every={config.reference.sync_every}",
      why="With adapters the reference is the base model, which is frozen.",
      fix="Set it to 0, or train all parameters: --config.lora.rank=0.",
    )
