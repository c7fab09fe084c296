# SPDX-License-Identifier: Apache-2.0
"""GRPO on the teaching protocol: the policy is the teacher.

One step: questions -> probe, teachings, answers -> reward -> advantages within
each group -> one token batch -> old and reference log-probabilities -> updates
on the clipped surrogate -> new weights for the sampler.
"""

from collections.abc import Callable, Sequence
import functools
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax import checkpoint, errors, sharding, types
from atlas_jax.data import loader
from atlas_jax.losses import grpo, reduce
from atlas_jax.models import decoder
from atlas_jax.rewards import teaching as rewards
from atlas_jax.teaching import protocol as teaching_protocol
from atlas_jax.train import agreement, collect, loop, score
from atlas_jax.train import optimizer as train_optimizer
from atlas_jax.train import state as train_state
from atlas_jax.train import step as train_step

_LENGTH_MULTIPLE = 32


def train(  # noqa: PLR0913 - one argument per collaborator.
  model: decoder.Model,
  params: decoder.Params,
  *,
  protocol: teaching_protocol.Protocol,
  reward_fn: types.RewardFn,
  questions: Sequence[types.Question],
  evaluate: loop.Evaluate,
  mesh: jax.sharding.Mesh,
  config: Any,  # Any: a ConfigDict, whose values have no static type.
  workdir: pathlib.Path,
  should_stop: Callable[[], bool],
) -> decoder.Params:
  """Trains the teacher, whose `params` it donates; returns them trained.

  Args:
    model: the policy's decoder.
    params: where to start, and the first reference.
    protocol: samples probes, teachings and answers; its policy's sampler gets
      the new weights before every step.
    reward_fn: rewards the graded records of one step.
    questions: what is taught.
    evaluate: metrics on held-out questions.
    mesh: as `sharding.make_mesh` makes it.
    config: sections `optimizer`, `batch`, `loss`, `reference`, `loop`,
      `checkpoint`, `sampling`, `overlap` and `agreement`; `seed`.
    workdir: holds metrics and checkpoints; trained from there if it has any.
    should_stop: asked after each step.

  Raises:
    errors.AtlasError: see `loop.run`, `collect.Collector` and
      `agreement.check`.
  """
  _check_overlap(config, mesh)
  updates = config.batch.num_iterations * config.batch.num_minibatches
  schedule = train_optimizer.make_schedule(
    **config.schedule, num_updates=config.loop.num_steps * updates
  )
  optimizer = train_optimizer.make_optimizer(schedule, **config.optimizer)
  # The trainer donates its parameters, so the reference is a copy.
  has_reference = config.loss.kl_coef > 0
  reference = jax.tree.map(jnp.copy, params) if has_reference else None
  state = train_state.create(params, optimizer, mesh=mesh, reference=reference)
  learner = _Learner(
    model,
    optimizer,
    shardings=train_state.shardings(state),
    mesh=mesh,
    config=config,
  )
  collector = collect.Collector(
    protocol,
    questions,
    batch_size=config.batch.num_questions,
    seed=config.seed,
    num_steps=config.loop.num_steps,
    max_staleness=config.overlap.max_staleness,
    compare_every=config.agreement.every,
  )

  def do_step(
    state: train_state.TrainState, step: int
  ) -> tuple[train_state.TrainState, loop.Metrics]:
    clock = _Clock()
    collector.settle()
    clock.lap("sample")
    collector.push(state.params, step)
    clock.lap("push")
    records = collector.take(step)
    clock.lap("sample")
    records = [rewards.grade(record) for record in records]
    rewarded, lag = collector.drop_stale(records, reward_fn(records), step)
    clock.lap("reward")
    state, metrics = learner.update(
      state,
      records,
      rewarded,
      is_compared=collector.is_compared(step),
    )
    clock.lap("train")
    described = _describe(records, rewarded)
    return state, {**described, **lag, **metrics, **clock.seconds}

  def evaluate_alone(state: train_state.TrainState, step: int) -> loop.Metrics:
    collector.settle()  # It samples too, and with other weights.
    return evaluate(state, step)

  with collector:
    state = loop.run(
      state,
      do_step,
      evaluate_alone,
      checkpointer=checkpoint.Checkpointer(
        workdir / "checkpoints",
        identity={"questions": loader.fingerprint(questions)},
        **config.checkpoint,
      ),
      workdir=workdir,
      should_stop=should_stop,
      **config.loop,
    )
  return state.params


def _check_overlap(
  config: Any,  # Any: as in `train`.
  mesh: jax.sharding.Mesh,
) -> None:
  """Refuses to sample and train at once where that would hang."""
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


class _Learner:
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
    self._rows = sharding.of_batch(mesh)
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
      batch = make_batch(
        [records[i].teacher_rollout for i in keep],
        flat_B[keep],
        multiple=self._multiple,
      )
      batch = jax.device_put(batch, self._rows)
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
    reference = jax.tree.map(
      lambda ref, new: (1.0 - mix) * ref + mix * new,
      state.reference,
      state.params,
    )
    return state._replace(reference=reference)


def make_batch(
  rollouts: Sequence[types.Rollout],
  advantages_B: np.ndarray,
  *,
  multiple: int,
) -> dict[str, np.ndarray]:
  """Lays rollouts out as rows: the very tokens that were sampled.

  Args:
    rollouts: one per row.
    advantages_B: one per rollout.
    multiple: the number of rows is rounded up to a power of two times this,
      and that of tokens to a multiple of 32, so that few shapes are compiled.
      What is added is padding that counts for nothing.

  Returns:
    `token_ids`, `positions`, `segment_ids` int32[B, T]; `loss_mask` bool[B, T],
    True on the tokens of completions; `rollout_logprobs` float32[B, T];
    `advantages` float32[B].
  """
  rows = [
    (r.prompt.token_ids, r.completion.token_ids, r.completion.logprobs)
    for r in rollouts
  ]
  longest = max(len(p) + len(c) for p, c, _ in rows)
  length = -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
  shape = (_round_up(len(rows), multiple), length)
  batch = {
    "token_ids": np.zeros(shape, np.int32),
    "positions": np.zeros(shape, np.int32),
    "segment_ids": np.zeros(shape, np.int32),
    "loss_mask": np.zeros(shape, bool),
    "rollout_logprobs": np.zeros(shape, np.float32),
    "advantages": np.zeros(shape[:1], np.float32),
  }
  batch["advantages"][: len(rows)] = advantages_B
  for i, (prompt, completion, logprobs) in enumerate(rows):
    start, end = len(prompt), len(prompt) + len(completion)
    batch["token_ids"][i, :end] = (*prompt, *completion)
    batch["positions"][i, :end] = np.arange(end)
    batch["segment_ids"][i, :end] = 1
    batch["loss_mask"][i, start:end] = True
    batch["rollout_logprobs"][i, start:end] = logprobs
  return batch


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
    model, params, batch, temperature=temperature, chunk_size=chunk_size
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


def _describe(
  records: Sequence[types.TeachingRecord], rewarded: Sequence[types.Reward]
) -> dict[str, float]:
  """Averages what the records and their rewards say."""
  values = [r.value for r in rewarded if r.value is not None]
  parts = [r.parts for r in rewarded if r.value is not None]
  names = dict.fromkeys(name for part in parts for name in part)
  completions = [r.teacher_rollout.completion for r in records]
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
    "teaching/accuracy": _mean_correct(r.taught for r in records),
    "teaching/baseline_accuracy": _mean_correct(r.baseline for r in records),
  }


def _mean_correct(attempts: Any) -> float:  # Any: an iterable of tuples.
  return float(np.mean([a.correct for group in attempts for a in group]))


def _num_tokens(record: types.TeachingRecord) -> int:
  rollout = record.teacher_rollout
  return len(rollout.prompt.token_ids) + len(rollout.completion.token_ids)


def _round_up(size: int, multiple: int) -> int:
  """Rounds up to `multiple` times a power of two."""
  while multiple < size:
    multiple *= 2
  return multiple


class _Clock:
  """Adds up the seconds of each phase."""

  def __init__(self) -> None:
    self.seconds: dict[str, float] = {}
    self._last = time.monotonic()

  def lap(self, phase: str) -> None:
    now = time.monotonic()
    name = f"seconds/{phase}"
    self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
    self._last = now
