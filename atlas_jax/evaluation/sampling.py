# SPDX-License-Identifier: Apache-2.0
"""Samples the records of an evaluation, with answers to paraphrases.

A student that copies an answer from its teaching is correct on the question but
not on a paraphrase with another answer. So it answers the paraphrase with the
same teaching too.
"""

from collections.abc import Sequence
import dataclasses

from atlas_jax import types
from atlas_jax.teaching import protocol as teaching_protocol


def sample(
  protocol: teaching_protocol.Rollouts,
  questions: Sequence[types.Question],
  seed: int,
) -> list[types.TeachingRecord]:
  """Runs the protocol, then samples answers to paraphrases.

  Args:
    protocol: samples the records. Only a `Protocol`, which has a student,
      answers paraphrases.
    questions: with distinct row ids.
    seed: of probes, teachings and taught answers.

  Returns:
    Ungraded records as from `protocol.run`. If a question has a paraphrase,
    `paraphrased` has `solve_params.group_size` answers to it for each teaching.
    If that prompt was dropped, the record has no `taught` answers either, and
    so counts as missing.

  Raises:
    ValueError: if `seed` is that of the baselines. Taught and baseline answers
      would use the same random numbers, and NDR requires independent ones.
  """
  if not isinstance(protocol, teaching_protocol.Protocol):
    return protocol.run(questions, seed)
  if seed == protocol.baseline_params.seed:
    raise ValueError(
      "The seed must differ from that of the baselines, got "
      f"{seed} for both: taught and baseline answers must be independent."
    )
  return _with_paraphrases(protocol, protocol.run(questions, seed), seed)


def _with_paraphrases(
  protocol: teaching_protocol.Protocol,
  records: list[types.TeachingRecord],
  seed: int,
) -> list[types.TeachingRecord]:
  """Adds the answers to paraphrases, from one call of the sampler."""
  size = protocol.teach_params.group_size
  prompts = {
    i: protocol.solve_prompt(
      rephrased, record.teaching, f"paraphrase/{i % size}"
    )
    for i, record in enumerate(records)
    if record.taught and (rephrased := record.question.rephrased())
  }
  if not prompts:
    return records
  params = dataclasses.replace(protocol.solve_params, seed=seed)
  written = protocol.student.write(list(prompts.values()), params)
  found = list(records)
  for i, answers in zip(prompts, written, strict=True):
    taught = records[i].taught if answers else ()
    found[i] = dataclasses.replace(
      records[i], taught=taught, paraphrased=answers
    )
  return found
