# SPDX-License-Identifier: Apache-2.0
"""Probe, teach, solve: one pass from questions to records.

The student writes a short probe of each question, the policy writes teachings
from question and probe, and the student answers with each teaching and, once
and for all, without. Nothing is scored here.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import time
import typing
from typing import Any

from absl import logging

from atlas_jax import chat, errors, types
from atlas_jax.teaching import templates as teaching_templates

_MAX_NAMED = 8  # Rows in a message.

# Makes a context that is entered around a phase of that name.
Phase = Callable[[str], contextlib.AbstractContextManager[object]]


@dataclasses.dataclass(frozen=True)
class Role:
  """Who writes: a sampler, and the tokenizer its weights were trained with."""

  sampler: types.Sampler
  tokenizer: chat.Tokenizer


class Rollouts(typing.Protocol):
  """Samples what a policy learns from: `Protocol` or `SingleModelRollouts`."""

  policy: Role

  @property
  def roles(self) -> Mapping[str, Role]:
    """Everybody who writes, by the name of the role."""
    ...

  def run(
    self,
    questions: Sequence[types.Question],
    seed: int,
    phase: Phase = contextlib.nullcontext,
  ) -> list[types.TeachingRecord]:
    """Gives ungraded records, a group of one size for each question.

    None for a question of which a sampler gave up a prompt.
    """
    ...

  def get_state(self) -> dict[str, Any]:  # Any: JSON.
    """Gives what a later `run` depends on, besides weights and seed."""
    ...

  def set_state(self, state: Mapping[str, Any]) -> None:  # Any: JSON.
    """Takes what `get_state` gave, in a process before this one."""
    ...


class Protocol:
  """Runs the teaching protocol, remembering each question's baseline answers.

  The student is taken to be frozen; answers of other student weights than the
  present ones are not reused. `policy` and `student` may share a sampler.
  """

  def __init__(
    self,
    policy: Role,
    student: Role,
    templates: teaching_templates.Templates,
    *,
    probe_params: types.SamplingParams,
    teach_params: types.SamplingParams,
    solve_params: types.SamplingParams,
    baseline_params: types.SamplingParams,
  ) -> None:
    """Sets who writes what, and how it is drawn.

    Args:
      policy: writes the teachings.
      student: writes probes and answers.
      templates: the four prompts.
      probe_params: one probe per question; its seed is replaced in each run.
      teach_params: `group_size` teachings per question; seed likewise.
      solve_params: `group_size` answers per teaching; seed likewise.
      baseline_params: `group_size` answers per question without teaching. Its
        seed is kept, so a question's baseline is the same in every run.

    Raises:
      ConfigError: if more than one probe is asked for.
    """
    if probe_params.group_size != 1:
      raise errors.ConfigError(
        f"{probe_params.group_size} probes per question were asked for.",
        where="probe_params.group_size",
        why="The teachings of one group must answer the same probe.",
        fix="Set it to 1.",
      )
    self.policy, self.student, self.templates = policy, student, templates
    self.probe_params, self.teach_params = probe_params, teach_params
    self.solve_params, self.baseline_params = solve_params, baseline_params
    self._baselines: dict[tuple[int, str, str], tuple[types.Attempt, ...]] = {}

  @property
  def roles(self) -> Mapping[str, Role]:
    """The policy and the student."""
    return {"policy": self.policy, "student": self.student}

  def run(
    self,
    questions: Sequence[types.Question],
    seed: int,
    phase: Phase = contextlib.nullcontext,
  ) -> list[types.TeachingRecord]:
    """Runs every phase once over all questions.

    That is at most four calls of a sampler: baselines (none if all are known),
    probes, teachings, taught answers.

    With `seed` equal to `baseline_params.seed`, the answers taught by the first
    teaching and the baseline answers are drawn with the same random numbers: a
    paired comparison. Where a completion holds no teaching the student gets the
    baseline prompt, so there the pair is the same answer twice.

    Args:
      questions: with distinct row ids.
      seed: decides probes, teachings and taught answers.
      phase: entered around each phase, with its name: `baseline`, `probe`,
        `teach` and `solve`.

    Returns:
      Ungraded records, `teach_params.group_size` for each question in turn; of
      a question with a prompt that a sampler gave up, none.
    """
    if not questions:
      return []
    with phase("baseline"):
      baselines = self._baseline_answers(questions)
    questions = [q for q in questions if q in baselines]
    started = time.monotonic()
    with phase("probe"):
      probes = self._probes(questions, seed)
    questions = [q for q in questions if q in probes]
    with phase("teach"):
      groups = self._teachings(questions, probes, seed)
    questions = [q for q in questions if q in groups]
    rollouts = [rollout for q in questions for rollout in groups[q]]
    texts = [
      chat.decode(self.policy.tokenizer, rollout.completion.token_ids)
      for rollout in rollouts
    ]
    teachings = [teaching_templates.extract_teaching(text) for text in texts]
    with phase("solve"):
      taught = self._taught_answers(questions, teachings, seed)
    seconds = (time.monotonic() - started) / max(1, len(rollouts))
    asked = [q for q in questions for _ in groups[q]]
    given_up = {
      q for q, answers in zip(asked, taught, strict=True) if not answers
    }
    return [
      types.TeachingRecord(
        question=question,
        probe=probes[question],
        teacher_rollout=rollouts[i],
        teaching=teachings[i],
        num_teaching_tokens=self._num_tokens(teachings[i]),
        baseline=baselines[question],
        taught=taught[i],
        seconds=seconds,
      )
      for i, question in enumerate(asked)
      if question not in given_up
    ]

  def get_state(self) -> dict[str, Any]:  # Any: JSON.
    """Gives the baseline answers; see `Rollouts`."""
    return {
      "asked": self._baseline_settings(),
      "baselines": [
        [*key, [dataclasses.asdict(answer) for answer in answers]]
        for key, answers in self._baselines.items()
      ],
    }

  def set_state(self, state: Mapping[str, Any]) -> None:  # Any: JSON.
    """Takes baseline answers, if they would be asked for alike today."""
    if state["asked"] != self._baseline_settings():
      logging.warning("Baselines are sampled anew: they are asked otherwise.")
      return
    for version, row_id, question, answers in state["baselines"]:
      drawn = tuple(types.Attempt(**answer) for answer in answers)
      self._baselines[version, row_id, question] = drawn

  def _baseline_settings(self) -> list[Any]:  # Any: JSON.
    params = dataclasses.asdict(self.baseline_params)
    return [self.templates.baseline, params]

  def baseline_prompt(self, question: types.Question) -> types.Prompt:
    """Asks the student for an answer without any teaching."""
    return self._solve_prompt(question, None, 0)

  def _baseline_answers(
    self, questions: Sequence[types.Question]
  ) -> dict[types.Question, tuple[types.Attempt, ...]]:
    """Answers without teaching, sampled where they are not known yet."""
    version = self.student.sampler.version
    keys = {q: (version, q.row_id, q.question) for q in questions}
    unknown = {
      key: question
      for question, key in keys.items()
      if key not in self._baselines
    }
    if unknown:
      prompts = [self._solve_prompt(q, None, 0) for q in unknown.values()]
      answers = self._answers(prompts, self.baseline_params)
      known = zip(unknown, answers, strict=True)
      # What was given up is asked again next time.
      self._baselines.update((key, drawn) for key, drawn in known if drawn)
    return {
      question: self._baselines[key]
      for question, key in keys.items()
      if key in self._baselines
    }

  def _probes(
    self, questions: Sequence[types.Question], seed: int
  ) -> dict[types.Question, str]:
    """Writes one probe per question, if it is not given up."""
    prompts = [
      make_prompt(
        self.student,
        f"{q.row_id}/probe",
        teaching_templates.fill(self.templates.probe, question=q.question),
      )
      for q in questions
    ]
    params = dataclasses.replace(self.probe_params, seed=seed)
    groups = self.student.sampler.sample(prompts, params)
    return {
      q: chat.decode(self.student.tokenizer, completion.token_ids).strip()
      for q, group in zip(questions, groups, strict=True)
      for completion in group
    }

  def _teachings(
    self,
    questions: Sequence[types.Question],
    probes: Mapping[types.Question, str],
    seed: int,
  ) -> dict[types.Question, list[types.Rollout]]:
    """Writes a group of completions per question, kept with their prompt.

    Those that were given up are left out.
    """
    prompts = [
      make_prompt(
        self.policy,
        f"{q.row_id}/teach",
        teaching_templates.fill(
          self.templates.teach, question=q.question, probe=probes[q]
        ),
      )
      for q in questions
    ]
    params = dataclasses.replace(self.teach_params, seed=seed)
    groups = self.policy.sampler.sample(prompts, params)
    return {
      q: [types.Rollout(prompt, completion) for completion in group]
      for q, prompt, group in zip(questions, prompts, groups, strict=True)
      if group
    }

  def _taught_answers(
    self,
    questions: Sequence[types.Question],
    teachings: Sequence[str | None],
    seed: int,
  ) -> list[tuple[types.Attempt, ...]]:
    """Answers once per teaching, or as the params' group size says.

    Not at all where that is given up.
    """
    size = self.teach_params.group_size
    prompts = [
      self._solve_prompt(questions[i // size], teaching, i % size)
      for i, teaching in enumerate(teachings)
    ]
    params = dataclasses.replace(self.solve_params, seed=seed)
    return self._answers(prompts, params)

  def _solve_prompt(
    self, question: types.Question, teaching: str | None, index: int
  ) -> types.Prompt:
    """Asks for an answer, with the teaching of that index if there is one."""
    if teaching is None:
      text = teaching_templates.fill(
        self.templates.baseline, question=question.question
      )
    else:
      text = teaching_templates.fill(
        self.templates.taught, question=question.question, teaching=teaching
      )
    return make_prompt(self.student, f"{question.row_id}/solve/{index}", text)

  def _answers(
    self, prompts: Sequence[types.Prompt], params: types.SamplingParams
  ) -> list[tuple[types.Attempt, ...]]:
    """Lets the student answer."""
    return [
      tuple(
        types.Attempt(
          text=chat.decode(self.student.tokenizer, completion.token_ids),
          num_tokens=len(completion.token_ids),
          finish_reason=completion.finish_reason,
        )
        for completion in group
      )
      for group in self.student.sampler.sample(prompts, params)
    ]

  def _num_tokens(self, teaching: str | None) -> int:
    """Counts the teaching alone, by the tokenizer that wrote it."""
    encode = self.policy.tokenizer.encode
    return len(encode(teaching or "", add_special_tokens=False))


def dropped_fraction(
  questions: Sequence[types.Question],
  records: Sequence[types.TeachingRecord],
  *,
  max_fraction: float,
) -> float:
  """Gives the fraction of questions that `Rollouts.run` gave no records of.

  Args:
    questions: that were asked; at least one.
    records: what it gave.
    max_fraction: how much of them may be missing; below 1.

  Raises:
    errors.RolloutError: if more is.
  """
  kept = {record.question for record in records}
  dropped = [q.row_id for q in questions if q not in kept]
  fraction = len(dropped) / len(questions)
  if fraction > max_fraction:
    raise errors.RolloutError(
      f"{len(dropped)} of {len(questions)} questions got no completions.",
      where=f"rows {', '.join(dropped[:_MAX_NAMED])}",
      why="Requests for them were late wherever they were sent; a fraction of "
      f"{max_fraction:g} may be.",
      fix="Look into the servers' logs, or allow one request more time with "
      "--config.rollout.generate_s; then run the same command again.",
    )
  return fraction


def make_prompt(role: Role, row_id: str, text: str) -> types.Prompt:
  """Renders one user turn for a role."""
  rendered, token_ids = chat.render(
    role.tokenizer, [types.Message("user", text)]
  )
  return types.Prompt(row_id=row_id, text=rendered, token_ids=token_ids)
