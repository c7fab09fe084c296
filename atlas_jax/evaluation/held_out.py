# SPDX-License-Identifier: Apache-2.0
"""Evaluates held-out questions during training."""

from collections.abc import Mapping, Sequence

from atlas_jax import types
from atlas_jax.evaluation import metrics, sampling
from atlas_jax.rewards import grading
from atlas_jax.teaching import missing
from atlas_jax.teaching import protocol as teaching_protocol


def evaluate(
  protocol: teaching_protocol.Rollouts,
  questions: Sequence[types.Question],
  *,
  grader: grading.Grader,
  seed: int,
  num_bootstrap: int,
  max_dropped_fraction: float,
) -> dict[str, float]:
  """Runs the protocol with the samplers' current weights; returns metrics.

  Args:
    protocol: samples the records.
    questions: with distinct row ids; at least one.
    grader: grades the answers.
    seed: the same for every evaluation of a run, so two evaluations differ only
      by their weights; see `sampling.sample`.
    num_bootstrap: see `metrics.summarize`.
    max_dropped_fraction: of the questions; see `missing.fraction`.

  Returns:
    Metrics of the answered questions, named as by `flatten` with the prefix
    `eval/`, `eval/dropped_fraction` and `eval/grading_failures`.

  Raises:
    errors.RolloutError: if too many questions have no completions.
    ValueError: see `sampling.sample`.
  """
  records = grader.grade(sampling.sample(protocol, questions, seed))
  protocol.keep_baselines(records)
  dropped = missing.fraction(
    questions, records, max_fraction=max_dropped_fraction
  )
  summary = metrics.of_answers(records, num_bootstrap=num_bootstrap, seed=seed)
  numbers = {
    "dropped_fraction": dropped,
    "grading_failures": float(grader.take_num_failures()),
    **flatten(summary),
  }
  return {f"eval/{name}": value for name, value in numbers.items()}


def flatten(summary: Mapping[str, object]) -> dict[str, float]:
  """Converts values to floats: an interval becomes `..._low`, `..._high`.

  Undefined values (None), such as TES without teachings, are left out.
  """
  numbers: dict[str, float] = {}
  for name, value in summary.items():
    if isinstance(value, list):
      end = name.removesuffix("_interval")
      numbers[f"{end}_low"], numbers[f"{end}_high"] = value
    elif isinstance(value, float | int):
      numbers[name] = float(value)
  return numbers
