# SPDX-License-Identifier: Apache-2.0
"""Samples answers from the policy alone: GRPO without a student.

The records have the same type as those of the teaching protocol, so rewards,
training and evaluation are shared. The policy's completion is the graded
answer.
"""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
from typing import Any

from atlas_jax import types
from atlas_jax.teaching import protocol, roles
from atlas_jax.teaching import templates as teaching_templates


class SingleModelRollouts:
  """Samples `answer_params.group_size` answers per question from the policy."""

  def __init__(
    self,
    policy: roles.Role,
    template: str,
    *,
    answer_params: types.SamplingParams,
  ) -> None:
    """Stores the policy, its prompt and its sampling parameters.

    Args:
      policy: writes the answers.
      template: the prompt, with a `{question}` placeholder.
      answer_params: of the answers; `run` replaces its seed.
    """
    self.policy, self.template = policy, template
    self.answer_params = answer_params

  @property
  def roles(self) -> Mapping[str, roles.Role]:
    """The policy alone."""
    return {"policy": self.policy}

  def run(
    self,
    questions: Sequence[types.Question],
    seed: int,
    phase: protocol.Phase = contextlib.nullcontext,
  ) -> list[types.TeachingRecord]:
    """Samples a group of answers to every question.

    Args:
      questions: with distinct row ids.
      seed: of the answers.
      phase: entered around sampling, with the name `solve`.

    Returns:
      Ungraded records, a group for each question in order. The answer is both
      `teacher_rollout` and the only `taught` attempt; `baseline` is empty. A
      question whose prompt was dropped has no records.
    """
    prompts = [
      self.policy.prompt(
        f"{q.row_id}/answer",
        teaching_templates.fill(self.template, question=q.question),
      )
      for q in questions
    ]
    params = dataclasses.replace(self.answer_params, seed=seed)
    with phase("solve"):
      groups = self.policy.sample(prompts, params)
    return [
      self._record(question, types.Rollout(prompt, completion))
      for question, prompt, group in zip(
        questions, prompts, groups, strict=True
      )
      for completion in group
    ]

  def keep_baselines(self, records: Sequence[types.TeachingRecord]) -> None:
    """Does nothing: there are no baselines."""

  def get_state(self) -> dict[str, Any]:  # Any: JSON.
    """Returns an empty state; see `protocol.Rollouts`."""
    return {}

  def set_state(self, state: Mapping[str, Any]) -> None:  # Any: JSON.
    """Does nothing: there is no state."""

  def _record(
    self, question: types.Question, rollout: types.Rollout
  ) -> types.TeachingRecord:
    completion = rollout.completion
    answer = types.Attempt(
      text=self.policy.read(rollout.prompt, completion.token_ids),
      num_tokens=len(completion.token_ids),
      finish_reason=completion.finish_reason,
    )
    return types.TeachingRecord(
      question=question,
      probe="",
      teacher_rollout=rollout,
      teaching=None,
      num_teaching_tokens=0,
      baseline=(),
      taught=(answer,),
      completion_text=self.policy.text(completion),
    )
