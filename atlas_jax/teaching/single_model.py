# SPDX-License-Identifier: Apache-2.0
"""The policy answers by itself: GRPO on verifiable rewards, without a student.

It gives the same records as the teaching protocol, so that rewards, training
and evaluation are the same. What the policy wrote is the answer that is judged.
"""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
from typing import Any

from atlas_jax import chat, types
from atlas_jax.teaching import protocol
from atlas_jax.teaching import templates as teaching_templates


class SingleModelRollouts:
  """Asks the policy every question `answer_params.group_size` times."""

  def __init__(
    self,
    policy: protocol.Role,
    template: str,
    *,
    answer_params: types.SamplingParams,
  ) -> None:
    """Sets who answers what.

    Args:
      policy: writes the answers.
      template: the prompt, with a `{question}`.
      answer_params: how answers are drawn; the seed is replaced in each run.
    """
    self.policy, self._template = policy, template
    self._answer_params = answer_params

  @property
  def roles(self) -> Mapping[str, protocol.Role]:
    """The policy alone."""
    return {"policy": self.policy}

  def run(
    self,
    questions: Sequence[types.Question],
    seed: int,
    phase: protocol.Phase = contextlib.nullcontext,
  ) -> list[types.TeachingRecord]:
    """Draws a group of answers to every question.

    Args:
      questions: with distinct row ids.
      seed: decides the answers.
      phase: entered around the sampling, as `solve`.

    Returns:
      Ungraded records, a group for each question in turn. The answer is the
      `teacher_rollout` and the one `taught` attempt; there is no baseline. Of
      a question that the sampler gave up there are none.
    """
    prompts = [
      protocol.make_prompt(
        self.policy,
        f"{q.row_id}/answer",
        teaching_templates.fill(self._template, question=q.question),
      )
      for q in questions
    ]
    params = dataclasses.replace(self._answer_params, seed=seed)
    with phase("solve"):
      groups = self.policy.sampler.sample(prompts, params)
    return [
      self._record(question, types.Rollout(prompt, completion))
      for question, prompt, group in zip(
        questions, prompts, groups, strict=True
      )
      for completion in group
    ]

  def get_state(self) -> dict[str, Any]:  # Any: JSON.
    """Gives nothing; see `protocol.Rollouts`."""
    return {}

  def set_state(self, state: Mapping[str, Any]) -> None:  # Any: JSON.
    """Takes nothing."""

  def _record(
    self, question: types.Question, rollout: types.Rollout
  ) -> types.TeachingRecord:
    completion = rollout.completion
    answer = types.Attempt(
      text=chat.decode(self.policy.tokenizer, completion.token_ids),
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
    )
