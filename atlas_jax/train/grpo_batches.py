# SPDX-License-Identifier: Apache-2.0
"""The records of each step, sampled during it or one step ahead.

With a staleness of 0 every step samples with its own weights. With 1, the next
batch is sampled while this step trains, with the weights this step started
from; `losses.correction` weights its tokens. Steps at which trainer and sampler
are compared never sample ahead.
"""

from collections.abc import Sequence
from concurrent import futures
import dataclasses

import numpy as np

from atlas_jax import checkpoint, errors, types
from atlas_jax.data import loader
from atlas_jax.models import decoder
from atlas_jax.teaching import missing
from atlas_jax.teaching import protocol as teaching_protocol
from atlas_jax.train.telemetry import clock as train_clock

STALE = "stale"

# The records of a step and the metrics of sampling them.
_Sampled = tuple[list[types.TeachingRecord], dict[str, float]]


class RolloutBatches:
  """Samples the batch of each step, and at most one batch ahead.

  A batch depends only on the seed, the step, the weights and `get_state`. So a
  resumed run equals an uninterrupted one, including the batch that was being
  sampled ahead.
  """

  def __init__(
    self,
    protocol: teaching_protocol.Rollouts,
    questions: loader.QuestionLoader,
    *,
    seed: int,
    num_steps: int,
    max_staleness: int,
    compare_every: int,
    max_dropped_fraction: float,
  ) -> None:
    """Validates the settings; sampling starts with `take`.

    Args:
      protocol: samples records. It must not be used elsewhere while a batch is
        sampled ahead; see `settle`.
      questions: the training questions.
      seed: sampling at a step uses `seed + step`.
      num_steps: steps of the run; later steps are not sampled ahead.
      max_staleness: 0 or 1, steps between the weights that sample and the
        weights that train.
      compare_every: steps between comparisons of trainer and sampler.
      max_dropped_fraction: of a batch's answers; in [0, 1).

    Raises:
      errors.ConfigError: if the settings contradict each other.
    """
    if max_staleness not in (0, 1) or compare_every < 1 + max_staleness:
      raise errors.ConfigError(
        "Invalid overlap: max_staleness must be 0 or 1, and every_steps at "
        "least 1 + max_staleness.",
        where=f"--config.overlap.max_staleness={max_staleness}, "
        f"--config.agreement.every_steps={compare_every}",
        why="At most one batch is sampled ahead, and never for a step at which "
        "trainer and sampler are compared.",
        fix="Set max_staleness to 0, or to 1 with agreement.every_steps of at "
        "least 2, for example 20.",
      )
    self._protocol, self._questions = protocol, questions
    self._seed = seed
    self._num_steps, self._compare_every = num_steps, compare_every
    self._max_staleness = max_staleness
    self._max_dropped_fraction = max_dropped_fraction
    self._executor = futures.ThreadPoolExecutor(1, "collect")
    self._ahead: dict[int, futures.Future[_Sampled]] = {}
    self._first_step: int | None = None
    self._refilled: dict[int, list[str]] = {}

  def __enter__(self) -> "RolloutBatches":
    return self

  def __exit__(self, *error: object) -> None:
    self._executor.shutdown(cancel_futures=True)

  def settle(self) -> None:
    """Waits for the batch being sampled ahead; `take` raises its failure."""
    futures.wait(self._ahead.values())

  def get_state(self) -> checkpoint.HostState:
    """Returns the state to resume from; waits for the batch sampled ahead.

    A batch that failed is left out and sampled again.
    """
    self.settle()
    ahead = []
    for step, future in self._ahead.items():
      if future.exception() is None:
        records, metrics = future.result()
        ahead.append([step, list(map(dataclasses.asdict, records)), metrics])
    return {"ahead": ahead, "protocol": self._protocol.get_state()}

  def set_state(self, state: checkpoint.HostState) -> None:
    """Restores what `get_state` returned in an earlier process."""
    self._protocol.set_state(state["protocol"])
    for step, records, metrics in state["ahead"]:
      self._ahead[step] = futures.Future()
      taken = list(map(types.teaching_record, records))
      self._ahead[step].set_result((taken, metrics))

  def push(self, params: decoder.Params, step: int) -> None:
    """Pushes the weights of `step` to the policy's sampler, once."""
    self.settle()
    if self._protocol.policy.sampler.version != step:
      self._protocol.policy.sampler.update_weights(params, step)

  def take(self, step: int, clock: train_clock.Clock) -> _Sampled:
    """Returns the batch of `step`, sampling it now unless it was ahead.

    Args:
      step: the number of completed steps.
      clock: records the phases of sampling now.

    Returns:
      The records and metrics: the fraction of questions without records, and
      the seconds of sampling ahead, which passed while the previous step
      trained.

    Raises:
      errors.RolloutError: if too many questions have no records.
    """
    if self._first_step is None:
      self._first_step = step
    # `row_ids` may still be called for the previous step.
    self._refilled = {step - 1: self._refilled.get(step - 1, [])}
    ready = self._ahead.pop(step, None)
    sampled = self._sample(step, clock) if ready is None else ready.result()
    upcoming = step + 1
    if (
      self._max_staleness
      and upcoming < self._num_steps
      and not self.is_compared(upcoming)
    ):
      self._ahead[upcoming] = self._executor.submit(
        self._sample_ahead, upcoming
      )
    return sampled

  def refill(
    self,
    step: int,
    records: Sequence[types.TeachingRecord],
    *,
    num_questions: int,
    clock: train_clock.Clock,
  ) -> list[types.TeachingRecord]:
    """Samples questions that `records` does not have yet.

    Source: Yu et al., arXiv:2503.14476, section 3.2, dynamic sampling; only the
    missing groups are sampled again.

    Args:
      step: the step whose weights the policy's sampler holds.
      records: the records of this step so far.
      num_questions: how many questions to sample, if as many are left.
      clock: records the phases, without the wait for the batch ahead.

    Returns:
      Records of new questions; empty if none are left or wanted, or if the
      samplers failed on all of them.
    """
    asked = {record.question.row_id for record in records}
    # The order depends on the step only, so each call continues the last one.
    order = np.random.default_rng((self._seed, step, 1))
    questions = self._questions.questions
    others = (questions[i] for i in order.permutation(len(questions)))
    fresh = [q for q in others if q.row_id not in asked][:num_questions]
    self._refilled.setdefault(step, []).extend(q.row_id for q in fresh)
    # On the single thread that samples ahead: one batch at a time.
    return self._executor.submit(
      self._protocol.run,
      fresh,
      seed=self._seed + step,
      phase=clock.phase,
    ).result()

  def is_compared(self, step: int) -> bool:
    """Returns whether trainer and sampler are compared at a step."""
    return step == self._first_step or step % self._compare_every == 0

  def drop_stale(
    self,
    records: Sequence[types.TeachingRecord],
    rewarded: Sequence[types.Reward],
    step: int,
  ) -> tuple[list[types.Reward], dict[str, float]]:
    """Removes the rewards of completions by weights that are too old.

    Returns:
      The rewards, missing with reason `STALE` where removed, and metrics.

    Raises:
      RuntimeError: if every completion is too old or any is newer than `step`:
        the sampler does not hold the pushed weights.
    """
    versions = [r.teacher_rollout.completion.version for r in records]
    lags = [step - version for version in versions]
    if min(lags) < 0 or min(lags) > self._max_staleness:
      raise RuntimeError(
        f"Completions have versions {sorted(set(versions))} at step {step}: "
        "the sampler does not hold the pushed weights."
      )
    kept = [
      dataclasses.replace(reward, value=None, missing_reason=STALE)
      if lag > self._max_staleness
      else reward
      for reward, lag in zip(rewarded, lags, strict=True)
    ]
    used = [lag for lag in lags if lag <= self._max_staleness]
    return kept, {
      "rollout/staleness": sum(used) / len(used),
      "rollout/stale_dropped": float(len(lags) - len(used)),
    }

  def keep_baselines(self, graded: Sequence[types.TeachingRecord]) -> None:
    """Caches the grades of baseline answers; see `protocol.Rollouts`."""
    self._protocol.keep_baselines(graded)

  def take_metrics(self) -> dict[str, float]:
    """Returns the samplers' metrics since the last call, by role."""
    return {
      f"rollout/{name}_{metric}": value
      for name, role in self._protocol.roles.items()
      for metric, value in role.sampler.take_metrics().items()
    }

  def row_ids(self, step: int) -> list[str]:
    """Returns the ids of a step's questions: its batch, then its refills."""
    batch = [question.row_id for question in self._questions.batch(step)]
    return batch + self._refilled.get(step, [])

  def _sample_ahead(self, step: int) -> _Sampled:
    clock = train_clock.Clock()
    records, dropped = self._sample(step, clock)
    seconds = clock.take().items()
    ahead = {f"seconds_ahead/{phase}": s for phase, s in seconds}
    return records, dropped | ahead

  def _sample(self, step: int, clock: train_clock.Clock) -> _Sampled:
    questions = self._questions.batch(step)
    records = self._protocol.run(
      questions, seed=self._seed + step, phase=clock.phase
    )
    dropped = missing.fraction(
      questions, records, max_fraction=self._max_dropped_fraction
    )
    return records, {"groups/dropped_fraction": dropped}
