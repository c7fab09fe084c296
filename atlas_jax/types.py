# SPDX-License-Identifier: Apache-2.0
"""Records shared between packages, and protocols of the objects that use them.

Imports only the standard library, so a rollout server without JAX can use it.
Every record is a frozen dataclass and serializes to one JSON line.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
from typing import Any, Literal, Protocol, TypeVar

_Json = TypeVar("_Json")
FinishReason = Literal["stop", "length"]
# A ConfigDict or one of its sections: its values have no static type.
Config = Any


@dataclasses.dataclass(frozen=True)
class Message:
  """One turn of a conversation."""

  role: str
  content: str


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A rendered prompt and its token ids.

  `row_id` names the data row of the prompt. Together with `SamplingParams.seed`
  it determines the random numbers, so results do not depend on the batch.
  """

  row_id: str
  text: str
  token_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class SamplingParams:
  """Sampling parameters.

  Each prompt gets `group_size` completions of at most `max_completion_tokens`
  tokens. A `temperature` of 0 is greedy; `top_p` of 1 and `top_k` of 0 disable
  these filters.
  """

  group_size: int
  max_completion_tokens: int
  temperature: float
  top_p: float
  top_k: int
  seed: int

  def __post_init__(self) -> None:
    """Validates ranges."""
    if self.group_size < 1 or self.max_completion_tokens < 1:
      raise ValueError(
        "group_size and max_completion_tokens must be >= 1, got "
        f"{self.group_size} and {self.max_completion_tokens}."
      )
    if self.temperature < 0.0 or not 0.0 < self.top_p <= 1.0 or self.top_k < 0:
      raise ValueError(
        "temperature must be >= 0, top_p in (0, 1] and top_k >= 0, got "
        f"{self.temperature}, {self.top_p} and {self.top_k}."
      )


@dataclasses.dataclass(frozen=True)
class Completion:
  """A sampled completion.

  `token_ids` end with the stop token if `finish_reason` is "stop". `logprobs`
  are those of the sampling distribution (after temperature, top-p and top-k);
  `model_logprobs` are the model's, at temperature 1. Both are in nats, one per
  token. `version` is the version of the sampler's weights.
  """

  token_ids: tuple[int, ...]
  logprobs: tuple[float, ...]
  model_logprobs: tuple[float, ...]
  finish_reason: FinishReason
  version: int


@dataclasses.dataclass(frozen=True)
class Rollout:
  """One prompt with one of its completions."""

  prompt: Prompt
  completion: Completion


@dataclasses.dataclass(frozen=True)
class Question:
  """A problem with its reference answer.

  `difficulty` and `solution`, a worked solution, may be empty. `paraphrase`
  asks for the same method in other words or with other numbers; it may be
  empty. Its answer is `paraphrase_answer`, or `answer` if that is empty.
  """

  row_id: str
  question: str
  answer: str
  difficulty: str = ""
  solution: str = ""
  paraphrase: str = ""
  paraphrase_answer: str = ""

  def rephrased(self) -> "Question | None":
    """Returns the paraphrase as a question, or None."""
    if not self.paraphrase:
      return None
    answer = self.paraphrase_answer or self.answer
    return Question(self.row_id, self.paraphrase, answer, self.difficulty)


@dataclasses.dataclass(frozen=True)
class Attempt:
  """An answer written by the student.

  `text` has no thinking, which `num_tokens` includes. `correct` is None until
  graded, and `answer` is the final answer that was graded.
  """

  text: str
  num_tokens: int
  finish_reason: FinishReason
  correct: bool | None = None
  answer: str | None = None


@dataclasses.dataclass(frozen=True)
class Reward:
  """A reward, or None with the reason why it is missing.

  `parts` are the terms that `value` is computed from, for logging.
  """

  value: float | None
  missing_reason: str = ""
  parts: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TeachingRecord:
  """One pass of the protocol: probe, teaching, baseline and taught answers.

  `teaching` is None if the completion has no teaching tags, and
  `num_teaching_tokens` is the length of `teaching` alone. `paraphrased` are
  answers to the question's paraphrase with the same teaching. `leaked` and the
  attempts' `correct` are None until graded. `seconds` is the wall time of the
  taught pass, divided by the number of records in the batch. `completion_text`
  is the whole text that the policy wrote, with its thinking and tags.
  """

  question: Question
  probe: str
  teacher_rollout: Rollout
  teaching: str | None
  num_teaching_tokens: int
  baseline: tuple[Attempt, ...]
  taught: tuple[Attempt, ...]
  leaked: bool | None = None
  reward: Reward | None = None
  seconds: float = 0.0
  paraphrased: tuple[Attempt, ...] = ()
  completion_text: str = ""


class Sampler(Protocol):
  """Samples completions with weights that can be updated."""

  @property
  def version(self) -> int:
    """The step of the current weights."""
    ...

  @property
  def context_length(self) -> int:
    """Maximum tokens of a prompt together with its completion."""
    ...

  @property
  def is_concurrent(self) -> bool:
    """Whether calls of `sample` from several threads run at the same time."""
    ...

  def sample(
    self, prompts: Sequence[Prompt], params: SamplingParams
  ) -> list[list[Completion]]:
    """Samples `params.group_size` completions per prompt, in order.

    A prompt that the sampler dropped, e.g. after timeouts, has an empty list.
    """
    ...

  def update_weights(self, params: Mapping[str, Any], version: int) -> None:
    """Replaces the weights by `params`, a nested dict of arrays."""
    ...

  def take_metrics(self) -> Mapping[str, float]:
    """Returns metrics since the previous call, by name."""
    ...


class Score(Protocol):
  """Computes log-probabilities of given completions."""

  def __call__(
    self,
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[int]],
    *,
    temperature: float,
  ) -> list[tuple[float, ...] | None]:
    """Returns per-token log-probabilities given the prompt, in nats.

    One completion per prompt, in order; `temperature` divides the logits. An
    item is None if prompt and completion exceed the model's context.
    """
    ...


class RewardFn(Protocol):
  """Computes the rewards of a batch of records."""

  def __call__(self, records: Sequence[TeachingRecord]) -> list[Reward]:
    """Returns one reward per record, in order."""
    ...


class OnFirstProcess(Protocol):
  """Runs a function in the first process only and shares its result."""

  def __call__(self, make: Callable[[], _Json]) -> _Json:
    """Returns the JSON value of `make` in the first process, in all of them."""
    ...


def to_json_line(record: Any) -> str:  # Any: each record class of this module.
  """Serializes a record to one line of JSON, without the newline."""
  return json.dumps(
    dataclasses.asdict(record), ensure_ascii=False, allow_nan=False
  )


def teaching_record(
  fields: Mapping[str, Any],  # Any: JSON.
) -> TeachingRecord:
  """Builds a `TeachingRecord` from the parsed output of `to_json_line`.

  Fields that earlier versions did not write get their defaults.

  Raises:
    KeyError, TypeError or ValueError: if the fields are invalid.
  """
  reward = fields["reward"]
  rollout = fields["teacher_rollout"]
  nested = {
    "question": Question(**fields["question"]),
    "teacher_rollout": Rollout(
      Prompt(**_tuples(rollout["prompt"])),
      completion(rollout["completion"]),
    ),
    "baseline": tuple(Attempt(**attempt) for attempt in fields["baseline"]),
    "taught": tuple(Attempt(**attempt) for attempt in fields["taught"]),
    "paraphrased": tuple(
      Attempt(**attempt) for attempt in fields.get("paraphrased", ())
    ),
    "reward": None if reward is None else Reward(**reward),
  }
  return TeachingRecord(**{**fields, **nested})


def completion(fields: Mapping[str, Any]) -> Completion:  # Any: JSON.
  """Builds a `Completion` from the output of `dataclasses.asdict`.

  Raises:
    KeyError, TypeError or ValueError: if the fields are invalid.
  """
  return Completion(**_tuples(fields))


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:  # Any: JSON.
  """Converts JSON lists to tuples."""
  return {
    name: tuple(value) if isinstance(value, list) else value
    for name, value in fields.items()
  }
