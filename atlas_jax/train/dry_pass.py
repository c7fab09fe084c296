# SPDX-License-Identifier: Apache-2.0
"""Shows one question on its way to a reward, before the first step of GRPO.

A base model that writes no tags, a template without the question, answers that
are cut off or a reward that fails can be read here, before a whole batch is
sampled.
"""

from collections.abc import Sequence
import dataclasses

from atlas_jax import types
from atlas_jax.rewards import grading
from atlas_jax.teaching import protocol
from atlas_jax.train.guards import diagnosis
from atlas_jax.train.telemetry import writer as train_writer


@dataclasses.dataclass(frozen=True)
class DryPass:
  """Samples, grades and rewards one question, and shows its texts.

  Training is bitwise the same with and without it: random numbers depend only
  on seed and row, and counts of the samplers and of the grader are reset.

  Attributes:
    rollouts: with small groups, and not those of training, whose cache of
      baselines is part of the checkpoints.
    grader: grades the answers.
    reward_fn: the reward of training.
    question: of the first batch.
    seed: of the first batch.
    writer: shows the report.
  """

  rollouts: protocol.Rollouts
  grader: grading.Grader
  reward_fn: types.RewardFn
  question: types.Question
  seed: int
  writer: train_writer.Writer

  def __call__(self) -> None:
    """Runs the pass."""
    records = self.grader.grade(self.rollouts.run([self.question], self.seed))
    rewarded = self.reward_fn(records) if records else []
    self.grader.take_num_failures()
    for role in self.rollouts.roles.values():
      role.sampler.take_metrics()
    self.writer.note(_report(self.question, records, rewarded))


def _report(
  question: types.Question,
  records: Sequence[types.TeachingRecord],
  rewarded: Sequence[types.Reward],
) -> str:
  lines = [f"Dry pass of row {question.row_id}:"]
  if not records:
    lines.append("  no completion: its prompt was dropped, see above")
  for record, reward in zip(records, rewarded, strict=True):
    lines.append(diagnosis.sample(record, reward))
  if records:
    found = diagnosis.faults(records, rewarded)
    lines += [f"  check: {fault}" for fault in found]
  return "\n".join(lines)
