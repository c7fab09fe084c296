# SPDX-License-Identifier: Apache-2.0
"""The completions of each GKD step, by the policy or from the data."""

from collections.abc import Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax import errors, types
from atlas_jax.data import pairs
from atlas_jax.losses import logprobs
from atlas_jax.models import decoder
from atlas_jax.train import optimizer_step, rollout_packing, score, trainable
from atlas_jax.train.guards import agreement
from atlas_jax.train.telemetry import clock as train_clock


class CompletionBatches:
  """Returns the prompts of each step with completions.

  Whether the policy samples them is drawn for each step from the seed and the
  step, like everything else. So a resumed run equals an uninterrupted one.
  """

  def __init__(  # noqa: PLR0913 - a config section beside collaborators.
    self,
    policy: trainable.Policy,
    sampler: types.Sampler | None,
    train_set: pairs.PairLoader,
    *,
    params: types.SamplingParams,
    vocab_size: int,
    chunk_tokens: int,
    on_policy_fraction: float,
    max_dropped_fraction: float,
    max_prob_error: float,
    compare_every: int,
  ) -> None:
    """Validates the settings; sampling starts with `take`.

    Args:
      policy: the model to train.
      sampler: of the policy; None if nothing is sampled.
      train_set: prompts with the completions of the data.
      params: sampling parameters; the step is added to the seed.
      vocab_size: of the teacher; completions with larger ids are dropped.
      chunk_tokens: tokens whose logits exist at the same time.
      on_policy_fraction: probability that a step is sampled from the policy;
        the paper's lambda.
      max_dropped_fraction: of a batch's completions, in [0, 1).
      max_prob_error: see `agreement.check`.
      compare_every: steps between comparisons of trainer and sampler.

    Raises:
      errors.ConfigError: if a setting is out of its range.
    """
    _check(on_policy_fraction, max_dropped_fraction, compare_every)
    if on_policy_fraction and sampler is None:
      raise ValueError("on_policy_fraction > 0 requires a sampler.")
    self._policy, self._sampler, self._train_set = policy, sampler, train_set
    self._params, self._vocab_size = params, vocab_size
    self._fraction = on_policy_fraction
    self._max_dropped = max_dropped_fraction
    self._max_prob_error = max_prob_error
    self._compare_every, self._is_new = compare_every, True
    cut = params.top_p < 1.0 or params.top_k > 0
    self._measure = jax.jit(
      functools.partial(
        _measure,
        policy.model,
        temperature=params.temperature or 1.0,
        chunk_tokens=chunk_tokens,
        support=logprobs.Support(params.top_p, params.top_k) if cut else None,
      ),
      static_argnums=3,
    )

  def is_sampled(self, step: int) -> bool:
    """Returns whether the policy samples the completions of a step."""
    drawn = np.random.default_rng((self._params.seed, step)).random()
    return drawn < self._fraction

  def take(
    self, trained: decoder.Params, step: int, clock: train_clock.Clock
  ) -> tuple[list[rollout_packing.Written], dict[str, float]]:
    """Returns the completions of a step and metrics.

    Args:
      trained: the trained parameters, pushed to the sampler if it samples.
      step: the number of completed steps.
      clock: records the phases.

    Raises:
      errors.RolloutError: if too many completions are missing.
      RuntimeError: if the sampler does not hold the pushed weights.
    """
    with clock.phase("data"):
      batch = self._train_set.batch(step)
    if self._sampler is None or not self.is_sampled(step):
      written = of_data(batch)
      return written, {"on_policy": 0.0, **_lengths(written)}
    with clock.phase("push"):
      if self._sampler.version != step:
        self._sampler.update_weights(self._policy.merged_params(trained), step)
    prompts = [
      types.Prompt(pair.row_id, "", tuple(pair.prompt.tolist()))
      for pair in batch
    ]
    params = dataclasses.replace(self._params, seed=self._params.seed + step)
    with clock.phase("sample"):
      groups = self._sampler.sample(prompts, params)
    return self._of_groups(prompts, groups, step)

  def compare(
    self,
    trained: decoder.Params,
    part: rollout_packing.Part,
    step: int,
  ) -> dict[str, float]:
    """Compares the log-probabilities of sampler and trainer, if it is due.

    Args:
      trained: the trained parameters that sampled the batch.
      part: packed completions, on the mesh.
      step: the number of completed steps.

    Raises:
      errors.DivergedError: see `agreement.check`.
    """
    is_due = step % self._compare_every == 0
    # The first sampled step of a process is checked too: its sampler is new.
    if not self.is_sampled(step) or not (is_due or self._is_new):
      return {}
    self._is_new = False
    params = self._policy.all_params(trained)
    found = self._measure(
      params, part.batch, part.num_used, part.num_microbatches
    )
    measured = {name: float(value) for name, value in found.items()}
    agreement.check(
      measured["rollout/prob_error"],
      step=step,
      max_prob_error=self._max_prob_error,
    )
    return measured if is_due else {}

  def _of_groups(
    self,
    prompts: Sequence[types.Prompt],
    groups: Sequence[Sequence[types.Completion]],
    step: int,
  ) -> tuple[list[rollout_packing.Written], dict[str, float]]:
    """Keeps the completions whose tokens both models have."""
    versions = {c.version for group in groups for c in group}
    if not versions <= {step}:
      raise RuntimeError(
        f"Completions have versions {sorted(versions)} at step {step}: the "
        "sampler does not hold the pushed weights."
      )
    kept = [
      (prompt, completion)
      for prompt, group in zip(prompts, groups, strict=True)
      for completion in group
      if max(completion.token_ids) < self._vocab_size
    ]
    num_wanted = len(prompts) * self._params.group_size
    dropped = 1.0 - len(kept) / num_wanted
    if dropped > self._max_dropped or not kept:
      raise errors.RolloutError(
        f"{num_wanted - len(kept)} of {num_wanted} completions are missing.",
        where=f"step {step}, --config.completions.max_dropped_fraction="
        f"{self._max_dropped:g}",
        why="Servers failed on their prompts, or the policy sampled ids "
        "outside the teacher's vocabulary.",
        fix="See the servers' logs and docs/rollout.md.",
      )
    written = [
      rollout_packing.Written(prompt.token_ids, c.token_ids, c.logprobs)
      for prompt, c in kept
    ]
    cut = [c.finish_reason == "length" for _, c in kept]
    sampler_metrics = self._sampler.take_metrics() if self._sampler else {}
    return written, {
      "on_policy": 1.0,
      "truncated_fraction": sum(cut) / len(cut),
      "dropped_fraction": dropped,
      **_lengths(written),
      **{f"rollout/policy_{k}": v for k, v in sampler_metrics.items()},
    }


def max_new_tokens(config: types.Config) -> int:
  """Returns the most tokens sampled after a prompt; 0 if none are sampled."""
  if not config.completions.on_policy_fraction:
    return 0
  return config.sampling.complete.max_completion_tokens


def of_data(batch: Sequence[pairs.Pair]) -> list[rollout_packing.Written]:
  """Returns the completions of the data, with log-probabilities of zero."""
  return [
    rollout_packing.Written(
      pair.prompt, pair.completion, np.zeros(len(pair.completion), np.float32)
    )
    for pair in batch
  ]


def _lengths(written: Sequence[rollout_packing.Written]) -> dict[str, float]:
  total = sum(len(w.completion) for w in written)
  return {"completion_length": total / len(written)}


def _measure(
  model: decoder.Model,
  params: decoder.Params,
  batch: optimizer_step.Batch,
  num_used: jax.Array,
  num_microbatches: int,
  *,
  temperature: float,
  chunk_tokens: int,
  support: logprobs.Support | None,
) -> dict[str, jax.Array]:
  """Scores a batch as its sampler did and measures the difference."""

  def of_microbatch(
    batch: optimizer_step.Batch,
  ) -> tuple[tuple[()], jax.Array, optimizer_step.Metrics]:
    stats = score.token_stats(
      model,
      params,
      batch,
      temperature=temperature,
      chunk_tokens=chunk_tokens,
      support=support,
    )
    rollout_BT = batch["rollout_logprobs"][:, 1:]
    mask_BT = batch["loss_mask"][:, 1:]
    measured = agreement.measure(stats.logprobs, rollout_BT, mask_BT)
    return (), jnp.sum(mask_BT), measured

  return optimizer_step.accumulate(
    of_microbatch, batch, num_used, num_microbatches=num_microbatches
  )[2]


def _check(
  on_policy_fraction: float, max_dropped_fraction: float, compare_every: int
) -> None:
  if (
    not 0.0 <= on_policy_fraction <= 1.0
    or not 0.0 <= max_dropped_fraction < 1.0
    or compare_every < 1
  ):
    raise errors.ConfigError(
      "Invalid completions: on_policy_fraction must be in [0, 1], "
      "max_dropped_fraction in [0, 1) and agreement.every_steps at least 1.",
      where="--config.completions, --config.agreement",
      why=f"They are {on_policy_fraction}, {max_dropped_fraction} and "
      f"{compare_every}.",
      fix="Set on_policy_fraction to 1.0, max_dropped_fraction to 0.25 and "
      "every_steps to 10, for example.",
    )
