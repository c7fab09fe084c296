# SPDX-License-Identifier: Apache-2.0
"""Records for each step: sampled in time, or ahead of it.

With a staleness of 0 every step samples with its own weights. With 1, the next
batch is sampled while this step trains, so by the weights that this step began
with; `losses.correction` weighs what they would say less or more.
Steps at which trainer and sampler are compared are always sampled in time.
"""

from collections.abc import Sequence
from concurrent import futures
import dataclasses

import numpy as np

from atlas_jax import checkpoint, errors, types
from atlas_jax.data import loader
from atlas_jax.models import decoder
from atlas_jax.teaching import protocol as teaching_protocol
from atlas_jax.train.telemetry import clock as train_clock

STALE = "stale"

# Records of a step, and the metrics of having sampled them.
_Sampled = tuple[list[types.TeachingRecord], dict[str, float]]


class RolloutBatches:
  """Samples the batch of each step; at most one of the next is under way.

  What a step samples depends on the seed, the step, the weights and the state
  that `get_state` gives alone. So a resumed run repeats the one that was not
  interrupted, the batch included that was under way.
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
    """Starts nothing yet.

    Args:
      protocol: samples; nobody else may while a batch is under way, see
        `settle`.
      questions: what is taught.
      seed: with the step added, of sampling.
      num_steps: no batch is sampled for steps from this one on.
      max_staleness: 0 or 1; steps between the weights that sample and those
        that train.
      compare_every: steps between those which are sampled in time.
      max_dropped_fraction: of a batch's questions; in [0, 1).

    Raises:
      errors.ConfigError: if these do not go together.
    """
    if max_staleness not in (0, 1) or compare_every < 1 + max_staleness:
      raise errors.ConfigError(
        "This overlap cannot be had.",
        where=f"--config.overlap.max_staleness={max_staleness}, "
        f"--config.agreement.every_steps={compare_every}",
        why="One batch at most is sampled ahead, and none of a step at which "
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
    """Waits until no batch is under way; a failure shows when it is taken."""
    futures.wait(self._ahead.values())

  def get_state(self) -> checkpoint.HostState:
    """Gives what a resumed run must have; waits for the batch under way.

    A batch that failed is no part of it, and is sampled again.
    """
    self.settle()
    ahead = []
    for step, future in self._ahead.items():
      if future.exception() is None:
        records, metrics = future.result()
        ahead.append([step, list(map(dataclasses.asdict, records)), metrics])
    return {"ahead": ahead, "protocol": self._protocol.get_state()}

  def set_state(self, state: checkpoint.HostState) -> None:
    """Takes what `get_state` gave, in a process before this one."""
    self._protocol.set_state(state["protocol"])
    for step, records, metrics in state["ahead"]:
      self._ahead[step] = futures.Future()
      taken = list(map(types.teaching_record, records))
      self._ahead[step].set_result((taken, metrics))

  def push(self, params: decoder.Params, step: int) -> None:
    """Gives the weights of `step` to the policy's sampler, once."""
    self.settle()
    if self._protocol.policy.sampler.version != step:
      self._protocol.policy.sampler.update_weights(params, step)

  def take(self, step: int, clock: train_clock.Clock) -> _Sampled:
    """Gives the batch of `step`; samples now if it was not sampled ahead.

    Args:
      step: the number of steps done.
      clock: is told the phases of what is sampled now.

    Returns:
      The records, and as metrics the fraction of questions without any, and
      the seconds that sampling ahead took: those passed while the step before
      trained.

    Raises:
      errors.RolloutError: if too many questions are without records.
    """
    if self._first_step is None:
      self._first_step = step
    # The step before may still be asked for.
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
    """Samples for other questions than those that `records` has.

    Source: Yu et al., arXiv:2503.14476, section 3.2, dynamic sampling; here
    only what is missing is sampled again.

    Args:
      step: whose weights the policy's sampler holds.
      records: of this step so far.
      num_questions: how many to ask, if there are as many left.
      clock: is told the phases; waiting for the batch ahead is in none.

    Returns:
      Records of those questions; none if there are none left, or none wanted,
      or the samplers gave up on all of them.
    """
    asked = {record.question.row_id for record in records}
    # In the same order each time, so that every call goes on from the last.
    order = np.random.default_rng((self._seed, step, 1))
    questions = self._questions.questions
    others = (questions[i] for i in order.permutation(len(questions)))
    fresh = [q for q in others if q.row_id not in asked][:num_questions]
    self._refilled.setdefault(step, []).extend(q.row_id for q in fresh)
    # After the batch that is being sampled ahead: one sampler, one at a time.
    return self._executor.submit(
      self._protocol.run,
      fresh,
      seed=self._seed + step,
      phase=clock.phase,
    ).result()

  def is_compared(self, step: int) -> bool:
    """Tells whether trainer and sampler are compared at a step."""
    return step == self._first_step or step % self._compare_every == 0

  def drop_stale(
    self,
    records: Sequence[types.TeachingRecord],
    rewarded: Sequence[types.Reward],
    step: int,
  ) -> tuple[list[types.Reward], dict[str, float]]:
    """Takes the reward from what weights too old have written.

    Returns:
      The rewards, missing as `STALE` where dropped, and metrics.

    Raises:
      RuntimeError: if nothing is left, or weights are from the future: the
        sampler did not take what it was given.
    """
    versions = [r.teacher_rollout.completion.version for r in records]
    lags = [step - version for version in versions]
    if min(lags) < 0 or min(lags) > self._max_staleness:
      raise RuntimeError(
        f"Completions of versions {sorted(set(versions))} at step {step}: the "
        "sampler did not take the weights it was given."
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

  def take_metrics(self) -> dict[str, float]:
    """Gives what the samplers did since it was last asked, by role."""
    return {
      f"rollout/{name}_{metric}": value
      for name, role in self._protocol.roles.items()
      for metric, value in role.sampler.take_metrics().items()
    }

  def row_ids(self, step: int) -> list[str]:
    """Names the questions of a step: its batch, then those asked beside it."""
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
    dropped = teaching_protocol.dropped_fraction(
      questions, records, max_fraction=self._max_dropped_fraction
    )
    return records, {"groups/dropped_fraction": dropped}
