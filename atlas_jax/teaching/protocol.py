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

from atlas_jax import chat, errors, types
from atlas_jax.teaching import templates as teaching_templates

# Makes a context that is entered around a phase of that name.
Phase = Callable[[str], contextlib.AbstractContextManager[object]]


@dataclasses.dataclass(frozen=True)
class Role:
  """Who writes: a sampler, and the tokenizer its weights were trained with."""

  sampler: types.Sampler
  tokenizer: chat.Tokenizer


class Rollouts(typing.Protocol):
  """What a policy learns from: `Protocol`, or `direct.Direct`."""

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
    """Gives ungraded records, a group of one size for each question."""
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
      Ungraded records, `teach_params.group_size` for each question in turn.
    """
    if not questions:
      return []
    with phase("baseline"):
      baselines = self._baseline_answers(questions)
    started = time.monotonic()
    with phase("probe"):
      probes = self._probes(questions, seed)
    with phase("teach"):
      rollouts = self._teachings(questions, probes, seed)
    texts = [
      chat.decode(self.policy.tokenizer, rollout.completion.token_ids)
      for rollout in rollouts
    ]
    teachings = [teaching_templates.extract_teaching(text) for text in texts]
    with phase("solve"):
      taught = self._taught_answers(questions, teachings, seed)
    seconds = (time.monotonic() - started) / len(rollouts)
    size = self.teach_params.group_size
    return [
      types.TeachingRecord(
        question=questions[i // size],
        probe=probes[i // size],
        teacher_rollout=rollout,
        teaching=teachings[i],
        num_teaching_tokens=self._num_tokens(teachings[i]),
        baseline=baselines[i // size],
        taught=taught[i],
        seconds=seconds,
      )
      for i, rollout in enumerate(rollouts)
    ]

  def baseline_prompt(self, question: types.Question) -> types.Prompt:
    """Asks the student for an answer without any teaching."""
    return self._solve_prompt(question, None, 0)

  def _baseline_answers(
    self, questions: Sequence[types.Question]
  ) -> list[tuple[types.Attempt, ...]]:
    """Answers without teaching, sampled where they are not known yet."""
    version = self.student.sampler.version
    keys = [(version, q.row_id, q.question) for q in questions]
    unknown = {
      key: question
      for key, question in zip(keys, questions, strict=True)
      if key not in self._baselines
    }
    if unknown:
      prompts = [self._solve_prompt(q, None, 0) for q in unknown.values()]
      answers = self._answers(prompts, self.baseline_params)
      self._baselines.update(zip(unknown, answers, strict=True))
    return [self._baselines[key] for key in keys]

  def _probes(
    self, questions: Sequence[types.Question], seed: int
  ) -> list[str]:
    """Writes one probe per question."""
    prompts = [
      make_prompt(
        self.student,
        f"{q.row_id}/probe",
        teaching_templates.fill(self.templates.probe, question=q.question),
      )
      for q in questions
    ]
    params = dataclasses.replace(self.probe_params, seed=seed)
    return [
      chat.decode(self.student.tokenizer, completion.token_ids).strip()
      for (completion,) in self.student.sampler.sample(prompts, params)
    ]

  def _teachings(
    self,
    questions: Sequence[types.Question],
    probes: Sequence[str],
    seed: int,
  ) -> list[types.Rollout]:
    """Writes a group of completions per question, kept with their prompt."""
    prompts = [
      make_prompt(
        self.policy,
        f"{q.row_id}/teach",
        teaching_templates.fill(
          self.templates.teach, question=q.question, probe=probe
        ),
      )
      for q, probe in zip(questions, probes, strict=True)
    ]
    params = dataclasses.replace(self.teach_params, seed=seed)
    groups = self.policy.sampler.sample(prompts, params)
    return [
      types.Rollout(prompt, completion)
      for prompt, group in zip(prompts, groups, strict=True)
      for completion in group
    ]

  def _taught_answers(
    self,
    questions: Sequence[types.Question],
    teachings: Sequence[str | None],
    seed: int,
  ) -> list[tuple[types.Attempt, ...]]:
    """Answers once per teaching, or as the params' group size says."""
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


def make_prompt(role: Role, row_id: str, text: str) -> types.Prompt:
  """Renders one user turn for a role."""
  rendered, token_ids = chat.render(
    role.tokenizer, [types.Message("user", text)]
  )
  return types.Prompt(row_id=row_id, text=rendered, token_ids=token_ids)
