# SPDX-License-Identifier: Apache-2.0
"""Runs the teaching protocol: questions to ungraded teaching records.

The student writes a probe for each question, the policy writes teachings from
question and probe, and the student answers with each teaching. The student's
answers without a teaching, the baselines, are sampled once and cached.
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

_MAX_NAMED = 8  # Rows listed in an error.

# Returns a context manager that is entered around the phase of that name.
Phase = Callable[[str], contextlib.AbstractContextManager[object]]


@dataclasses.dataclass(frozen=True)
class Role:
  """A sampler and the tokenizer of its weights."""

  sampler: types.Sampler
  tokenizer: chat.Tokenizer


class Rollouts(typing.Protocol):
  """Samples the records a policy is trained on.

  Implemented by `Protocol` and `SingleModelRollouts`.
  """

  policy: Role

  @property
  def roles(self) -> Mapping[str, Role]:
    """All roles by name."""
    ...

  def run(
    self,
    questions: Sequence[types.Question],
    seed: int,
    phase: Phase = contextlib.nullcontext,
  ) -> list[types.TeachingRecord]:
    """Returns ungraded records, a group of the same size for each question.

    A question has no records if a sampler dropped one of its prompts.
    """
    ...

  def get_state(self) -> dict[str, Any]:  # Any: JSON.
    """Returns the state that later runs depend on, except weights and seed."""
    ...

  def set_state(self, state: Mapping[str, Any]) -> None:  # Any: JSON.
    """Restores the result of `get_state` of an earlier process."""
    ...


class Protocol:
  """Runs the teaching protocol and caches each question's baseline answers.

  Cached answers are reused only for the same student weights, so the student is
  normally frozen. `policy` and `student` may share a sampler.
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
    """Stores the roles and the sampling parameters of each phase.

    Args:
      policy: writes the teachings.
      student: writes probes and answers.
      templates: the four prompts.
      probe_params: one probe per question; `run` replaces its seed.
      teach_params: `group_size` teachings per question; `run` replaces its
        seed.
      solve_params: `group_size` answers per teaching; `run` replaces its seed.
      baseline_params: `group_size` answers per question without a teaching. Its
        seed is kept, so a question's baseline is the same in every run.

    Raises:
      ConfigError: if `probe_params.group_size` is not 1.
    """
    if probe_params.group_size != 1:
      raise errors.ConfigError(
        f"group_size of probe_params must be 1, got {probe_params.group_size}.",
        where="probe_params.group_size",
        why="All teachings of a group must answer the same probe.",
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

    This takes at most four sampler calls: baselines (skipped if all are
    cached), probes, teachings, taught answers.

    If `seed` equals `baseline_params.seed`, the answers to the first teaching
    and the baseline answers use the same random numbers: a paired comparison.
    If a completion contains no teaching, the student gets the baseline prompt,
    so both answers of that pair are the same.

    Args:
      questions: with distinct row ids.
      seed: of probes, teachings and taught answers.
      phase: entered around each phase, with its name: `baseline`, `probe`,
        `teach` and `solve`.

    Returns:
      Ungraded records, `teach_params.group_size` for each question in order. A
      question has no records if a sampler dropped one of its prompts.
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
    per_rollout = [q for q in questions for _ in groups[q]]
    rows = zip(per_rollout, rollouts, teachings, taught, strict=True)
    return self._records(list(rows), probes, baselines, seconds)

  def get_state(self) -> dict[str, Any]:  # Any: JSON.
    """Returns the cached baseline answers and their sampling settings."""
    return {
      "asked": self._baseline_settings(),
      "baselines": [
        [*key, [dataclasses.asdict(answer) for answer in answers]]
        for key, answers in self._baselines.items()
      ],
    }

  def set_state(self, state: Mapping[str, Any]) -> None:  # Any: JSON.
    """Restores cached baseline answers if prompt and sampling are unchanged."""
    if state["asked"] != self._baseline_settings():
      logging.warning(
        "Baseline prompt or sampling changed; resampling baselines."
      )
      return
    for version, row_id, question, answers in state["baselines"]:
      drawn = tuple(types.Attempt(**answer) for answer in answers)
      self._baselines[version, row_id, question] = drawn

  def _baseline_settings(self) -> list[Any]:  # Any: JSON.
    params = dataclasses.asdict(self.baseline_params)
    return [self.templates.baseline, params]

  def baseline_prompt(self, question: types.Question) -> types.Prompt:
    """Returns the student's prompt for a question without a teaching."""
    return self._solve_prompt(question, None, 0)

  def _baseline_answers(
    self, questions: Sequence[types.Question]
  ) -> dict[types.Question, tuple[types.Attempt, ...]]:
    """Returns answers without a teaching; samples those not cached."""
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
      # Dropped prompts are not cached, so the next run samples them again.
      self._baselines.update((key, drawn) for key, drawn in known if drawn)
    return {
      question: self._baselines[key]
      for question, key in keys.items()
      if key in self._baselines
    }

  def _probes(
    self, questions: Sequence[types.Question], seed: int
  ) -> dict[types.Question, str]:
    """Samples one probe per question; omits dropped prompts."""
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
    """Samples a group of rollouts per question; omits dropped prompts."""
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
    """Samples `solve_params.group_size` answers per teaching.

    A dropped prompt has an empty tuple.
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
    """Returns the student's prompt, with a teaching unless it is None."""
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
    """Samples the student's answers."""
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

  def _records(
    self,
    rows: Sequence[
      tuple[
        types.Question, types.Rollout, str | None, tuple[types.Attempt, ...]
      ]
    ],
    probes: Mapping[types.Question, str],
    baselines: Mapping[types.Question, tuple[types.Attempt, ...]],
    seconds: float,
  ) -> list[types.TeachingRecord]:
    """Builds a record per row of question, rollout, teaching and answers.

    A row without answers drops all rows of its question.
    """
    dropped = {question for question, *_, taught in rows if not taught}
    return [
      types.TeachingRecord(
        question=question,
        probe=probes[question],
        teacher_rollout=rollout,
        teaching=teaching,
        num_teaching_tokens=self._num_tokens(teaching),
        baseline=baselines[question],
        taught=taught,
        seconds=seconds,
      )
      for question, rollout, teaching, taught in rows
      if question not in dropped
    ]

  def _num_tokens(self, teaching: str | None) -> int:
    """Returns the length of a teaching in tokens of the policy's tokenizer."""
    encode = self.policy.tokenizer.encode
    return len(encode(teaching or "", add_special_tokens=False))


def dropped_fraction(
  questions: Sequence[types.Question],
  records: Sequence[types.TeachingRecord],
  *,
  max_fraction: float,
) -> float:
  """Returns the fraction of questions without records.

  Args:
    questions: passed to `Rollouts.run`; at least one.
    records: returned by it.
    max_fraction: largest fraction allowed, below 1.

  Raises:
    errors.RolloutError: if the fraction is larger.
  """
  kept = {record.question for record in records}
  dropped = [q.row_id for q in questions if q not in kept]
  fraction = len(dropped) / len(questions)
  if fraction > max_fraction:
    raise errors.RolloutError(
      f"{len(dropped)} of {len(questions)} questions have no completions; the "
      f"allowed fraction is {max_fraction:g}.",
      where=f"rows {', '.join(dropped[:_MAX_NAMED])}",
      why="Their requests timed out on every server they were sent to.",
      fix="Check the servers' logs, or raise the time limit of a request, "
      "--config.rollout.generate_s; then run the same command again.",
    )
  return fraction


def make_prompt(role: Role, row_id: str, text: str) -> types.Prompt:
  """Renders one user turn with the chat template of a role."""
  rendered, token_ids = chat.render(
    role.tokenizer, [types.Message("user", text)]
  )
  return types.Prompt(row_id=row_id, text=rendered, token_ids=token_ids)
