# SPDX-License-Identifier: Apache-2.0
"""Counts the answers that are missing since prompts were dropped."""

from collections.abc import Sequence

from atlas_jax import errors, types

_MAX_NAMED = 8  # Rows listed in an error.


def fraction(
  questions: Sequence[types.Question],
  records: Sequence[types.TeachingRecord],
  *,
  max_fraction: float,
) -> float:
  """Returns the mean fraction of a question's records without answers.

  Args:
    questions: passed to `protocol.Rollouts.run`; at least one.
    records: returned by it.
    max_fraction: largest fraction allowed, below 1.

  Raises:
    errors.RolloutError: if the fraction is larger.
  """
  answered: dict[types.Question, list[bool]] = {}
  for record in records:
    answered.setdefault(record.question, []).append(bool(record.taught))
  fractions = {
    q.row_id: 1.0 - sum(of_one) / len(of_one) if of_one else 1.0
    for q in questions
    for of_one in [answered.get(q, [])]
  }
  mean = sum(fractions.values()) / len(fractions)
  if mean > max_fraction:
    dropped = [row_id for row_id, each in fractions.items() if each]
    raise errors.RolloutError(
      f"{len(dropped)} of {len(questions)} questions lack answers, {mean:.1%} "
      f"of all; the allowed fraction is {max_fraction:g}.",
      where=f"rows {', '.join(dropped[:_MAX_NAMED])}",
      why="Their prompts were too long, or their requests timed out on every "
      "server they were sent to; warnings in the log name them.",
      fix="If they were too long, lower sampling.teach.max_completion_tokens, "
      "or leave out long questions. If they timed out, check the servers' "
      "logs, or raise --config.rollout.generate_s. Then run the same command "
      "again.",
    )
  return mean
