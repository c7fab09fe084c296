# SPDX-License-Identifier: Apache-2.0
"""Runs the teaching protocol: questions to ungraded teaching records.

The student writes a probe for each question, the policy writes teachings from
question and probe, and the student answers with each teaching. The student's
answers without a teaching, the baselines, are sampled once and cached.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
import contextlib
import dataclasses
import hashlib
import time
import typing
from typing import Any, NamedTuple

from absl import logging

from atlas_jax import errors, types
from atlas_jax.teaching import roles
from atlas_jax.teaching import templates as teaching_templates

_MAX_ANSWER = 200  # Characters of a final answer that are cached.

# Returns a context manager that is entered around the phase of that name.
Phase = Callable[[str], contextlib.AbstractContextManager[object]]
# A version of the student's weights, a row id and a digest of its question.
_Key = tuple[int, str, str]
_Baselines = dict[types.Question, tuple[types.Attempt, ...]]


class _Taught(NamedTuple):
  """A rollout of the policy, and what the student made of it."""

  question: types.Question
  probe: str
  teacher_rollout: types.Rollout
  teaching: str | None
  taught: tuple[types.Attempt, ...]


class Rollouts(typing.Protocol):
  """Samples the records a policy is trained on.

  Implemented by `Protocol` and `SingleModelRollouts`.
  """

  policy: roles.Role

  @property
  def roles(self) -> Mapping[str, roles.Role]:
    """All roles by name."""
    ...

  def run(
    self,
    questions: Sequence[types.Question],
    seed: int,
    phase: Phase = contextlib.nullcontext,
  ) -> list[types.TeachingRecord]:
    """Returns ungraded records, a group of the same size for each question.

    A question has no records if its own prompts were dropped; a record has no
    `taught` answers if theirs was.
    """
    ...

  def keep_baselines(self, records: Sequence[types.TeachingRecord]) -> None:
    """Replaces cached baseline answers by their grades, which are smaller."""
    ...

  def get_state(self) -> dict[str, Any]:  # Any: JSON.
    """Returns the state that later runs depend on, except weights and seed."""
    ...

  def set_state(self, state: Mapping[str, Any]) -> None:  # Any: JSON.
    """Restores the result of `get_state` of an earlier process."""
    ...


class Protocol:
  """Runs the teaching protocol and caches each question's baseline answers.

  Cached answers are reused only for the same student weights, which must not
  change while records are sampled.
  """

  def __init__(
    self,
    policy: roles.Role,
    student: roles.Role,
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
    self._baselines: dict[_Key, tuple[types.Attempt, ...]] = {}

  @property
  def roles(self) -> Mapping[str, roles.Role]:
    """The policy and the student."""
    return {"policy": self.policy, "student": self.student}

  def run(
    self,
    questions: Sequence[types.Question],
    seed: int,
    phase: Phase = contextlib.nullcontext,
  ) -> list[types.TeachingRecord]:
    """Runs every phase once for all questions.

    If both samplers are concurrent, each question proceeds to its next phase by
    itself, so that policy and student sample at the same time. Otherwise this
    takes at most four sampler calls: baselines (skipped if all are cached),
    probes, teachings, taught answers. The records are the same.

    If `seed` equals `baseline_params.seed`, the answers to the first teaching
    and the baseline answers use the same random numbers: a paired comparison.
    If a completion contains no teaching, the student gets the baseline prompt,
    so both answers of that pair are the same.

    Args:
      questions: with distinct row ids.
      seed: of probes, teachings and taught answers.
      phase: entered around each phase, with its name: `baseline`, `probe`,
        `teach` and `solve`, or `rollout` for all of them together.

    Returns:
      Ungraded records, `teach_params.group_size` for each question in order;
      see `Rollouts.run` for prompts that were dropped.
    """
    if not questions:
      return []
    started = time.monotonic()
    if all(role.sampler.is_concurrent for role in self.roles.values()):
      with phase("rollout"):
        baselines, rows = self._sample_each(questions, seed)
    else:
      with phase("baseline"):
        baselines = self._baseline_answers(questions)
      questions = [q for q in questions if q in baselines]
      started = time.monotonic()
      rows = self._teach(questions, seed, phase)
    seconds = (time.monotonic() - started) / max(1, len(rows))
    return [
      types.TeachingRecord(
        num_teaching_tokens=self._num_tokens(row.teaching),
        baseline=baselines[row.question],
        seconds=seconds,
        completion_text=self.policy.text(row.teacher_rollout.completion),
        **row._asdict(),
      )
      for row in rows
      if row.question in baselines
    ]

  def keep_baselines(self, records: Sequence[types.TeachingRecord]) -> None:
    """Replaces cached baseline answers by their grades; see `Rollouts`."""
    for record in records:
      drawn = tuple(map(_without_text, record.baseline))
      self._baselines[self._key(record.question)] = drawn

  def get_state(self) -> dict[str, Any]:  # Any: JSON.
    """Returns the graded baseline answers and their sampling settings.

    Answers that are not graded yet are in the records of a batch that was
    sampled ahead.
    """
    return {
      "asked": self._baseline_settings(),
      "baselines": [
        [
          *key,
          [(a.num_tokens, a.finish_reason, a.correct, a.answer) for a in drawn],
        ]
        for key, drawn in sorted(self._baselines.items())
        if all(a.correct is not None for a in drawn)
      ],
    }

  def set_state(self, state: Mapping[str, Any]) -> None:  # Any: JSON.
    """Restores cached baseline answers if prompt and sampling are unchanged."""
    if state["asked"] != self._baseline_settings():
      logging.warning(
        "Baseline prompt or sampling changed; resampling baselines."
      )
      return
    for version, row_id, digest, drawn in state["baselines"]:
      self._baselines[version, row_id, digest] = tuple(
        types.Attempt("", *fields) for fields in drawn
      )

  def _baseline_settings(self) -> list[Any]:  # Any: JSON.
    params = dataclasses.asdict(self.baseline_params)
    thinking = self.student.max_thinking_tokens
    return [self.templates.baseline, params, thinking]

  def baseline_prompt(self, question: types.Question) -> types.Prompt:
    """Returns the student's prompt for a question without a teaching."""
    return self.solve_prompt(question, None, "solve/0")

  def _key(self, question: types.Question) -> _Key:
    digest = hashlib.sha256(question.question.encode()).hexdigest()[:16]
    return self.student.sampler.version, question.row_id, digest

  def _sample_each(
    self, questions: Sequence[types.Question], seed: int
  ) -> tuple[_Baselines, list[_Taught]]:
    """Samples every question in threads of its own; see `_teach`."""
    with futures.ThreadPoolExecutor(2 * len(questions), "question") as pool:
      alone = [pool.submit(self._baseline_answers, [q]) for q in questions]
      taught = [pool.submit(self._teach, [q], seed) for q in questions]
      try:
        baselines = {q: a for f in alone for q, a in f.result().items()}
        return baselines, [row for f in taught for row in f.result()]
      finally:
        pool.shutdown(wait=False, cancel_futures=True)

  def _baseline_answers(
    self, questions: Sequence[types.Question]
  ) -> _Baselines:
    """Returns answers without a teaching; samples those not cached."""
    keys = {q: self._key(q) for q in questions}
    unknown = {
      key: question
      for question, key in keys.items()
      if key not in self._baselines
    }
    if unknown:
      prompts = [self.baseline_prompt(q) for q in unknown.values()]
      answers = self.student.write(prompts, self.baseline_params)
      known = zip(unknown, answers, strict=True)
      # Dropped prompts are not cached, so the next run samples them again.
      self._baselines.update((key, drawn) for key, drawn in known if drawn)
    return {
      question: self._baselines[key]
      for question, key in keys.items()
      if key in self._baselines
    }

  def _teach(
    self,
    questions: Sequence[types.Question],
    seed: int,
    phase: Phase = contextlib.nullcontext,
  ) -> list[_Taught]:
    """Runs the phases after the baseline; leaves out dropped questions."""
    with phase("probe"):
      probes = self._probes(questions, seed)
    questions = [q for q in questions if q in probes]
    with phase("teach"):
      groups = self._teachings(questions, probes, seed)
    rollouts = [(q, rollout) for q in questions for rollout in groups[q]]
    teachings = [
      teaching_templates.extract_teaching(
        self.policy.read(rollout.prompt, rollout.completion.token_ids)
      )
      for _, rollout in rollouts
    ]
    with phase("solve"):
      taught = self._taught_answers(
        [question for question, _ in rollouts], teachings, seed
      )
    rows = zip(rollouts, teachings, taught, strict=True)
    return [
      _Taught(question, probes[question], rollout, teaching, answers)
      for (question, rollout), teaching, answers in rows
    ]

  def _probes(
    self, questions: Sequence[types.Question], seed: int
  ) -> dict[types.Question, str]:
    """Samples one probe per question; omits dropped prompts."""
    prompts = [
      self.student.prompt(
        f"{q.row_id}/probe",
        teaching_templates.fill(self.templates.probe, question=q.question),
      )
      for q in questions
    ]
    params = dataclasses.replace(self.probe_params, seed=seed)
    groups = self.student.write(prompts, params)
    return {
      q: probe.text
      for q, group in zip(questions, groups, strict=True)
      for probe in group
    }

  def _teachings(
    self,
    questions: Sequence[types.Question],
    probes: Mapping[types.Question, str],
    seed: int,
  ) -> dict[types.Question, list[types.Rollout]]:
    """Samples a group of rollouts per question, empty if it was dropped."""
    prompts = [
      self.policy.prompt(
        f"{q.row_id}/teach",
        teaching_templates.fill(
          self.templates.teach, question=q.question, probe=probes[q]
        ),
      )
      for q in questions
    ]
    params = dataclasses.replace(self.teach_params, seed=seed)
    groups = self.policy.sample(prompts, params)
    return {
      q: [types.Rollout(prompt, completion) for completion in group]
      for q, prompt, group in zip(questions, prompts, groups, strict=True)
    }

  def _taught_answers(
    self,
    questions: Sequence[types.Question],
    teachings: Sequence[str | None],
    seed: int,
  ) -> list[tuple[types.Attempt, ...]]:
    """Samples `solve_params.group_size` answers per teaching of a question.

    A dropped prompt has an empty tuple.
    """
    size = self.teach_params.group_size
    prompts = [
      self.solve_prompt(question, teaching, f"solve/{i % size}")
      for i, (question, teaching) in enumerate(
        zip(questions, teachings, strict=True)
      )
    ]
    params = dataclasses.replace(self.solve_params, seed=seed)
    return self.student.write(prompts, params)

  def solve_prompt(
    self, question: types.Question, teaching: str | None, name: str
  ) -> types.Prompt:
    """Returns the student's prompt, with a teaching unless it is None.

    Its `row_id` is that of the question, followed by `name`.
    """
    if teaching is None:
      text = teaching_templates.fill(
        self.templates.baseline, question=question.question
      )
    else:
      text = teaching_templates.fill(
        self.templates.taught, question=question.question, teaching=teaching
      )
    return self.student.prompt(f"{question.row_id}/{name}", text)

  def _num_tokens(self, teaching: str | None) -> int:
    """Returns the length of a teaching in tokens of the policy's tokenizer."""
    encode = self.policy.tokenizer.encode
    return len(encode(teaching or "", add_special_tokens=False))


def _without_text(attempt: types.Attempt) -> types.Attempt:
  """Returns a graded attempt in bounded size."""
  answer = attempt.answer and attempt.answer[:_MAX_ANSWER]
  return dataclasses.replace(attempt, text="", answer=answer)
