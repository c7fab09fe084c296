# SPDX-License-Identifier: Apache-2.0
"""Records which cross package borders, and the protocols that pass them.

Imports nothing heavy, so a rollout server without JAX can use it. Every record
is a frozen dataclass and can be written as one JSON line.
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
  """What a sampler continues.

  `row_id` names the row this prompt came from. With `SamplingParams.seed` it
  fixes the random numbers, so a prompt samples alike in any batch.
  """

  row_id: str
  text: str
  token_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class SamplingParams:
  """How completions are drawn.

  `group_size` completions per prompt, each at most `max_completion_tokens`
  long. A `temperature` of 0 is greedy; `top_p` of 1 and `top_k` of 0 keep the
  whole vocabulary.
  """

  group_size: int
  max_completion_tokens: int
  temperature: float
  top_p: float
  top_k: int
  seed: int

  def __post_init__(self) -> None:
    """Refuses values no sampler could honour."""
    if self.group_size < 1 or self.max_completion_tokens < 1:
      raise ValueError(
        "group_size and max_completion_tokens must be at least 1, got "
        f"{self.group_size} and {self.max_completion_tokens}."
      )
    if self.temperature < 0.0 or not 0.0 < self.top_p <= 1.0 or self.top_k < 0:
      raise ValueError(
        "Expected temperature >= 0, 0 < top_p <= 1 and top_k >= 0, got "
        f"{self.temperature}, {self.top_p} and {self.top_k}."
      )


@dataclasses.dataclass(frozen=True)
class Completion:
  """What a sampler wrote.

  `token_ids` end with the stop token when `finish_reason` is "stop".
  `logprobs` are of the distribution that was drawn from (temperature, top-p and
  top-k applied); `model_logprobs` are the model's own, at temperature 1. Both
  in nats, one per token. `version` is that of the weights that wrote it.
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

  `difficulty` and `solution`, the way to the answer, may be empty.
  """

  row_id: str
  question: str
  answer: str
  difficulty: str = ""
  solution: str = ""


@dataclasses.dataclass(frozen=True)
class Attempt:
  """An answer written by the student. `correct` is None until graded."""

  text: str
  num_tokens: int
  finish_reason: FinishReason
  correct: bool | None = None


@dataclasses.dataclass(frozen=True)
class Reward:
  """A reward, or None with the reason why there is none."""

  value: float | None
  missing_reason: str = ""
  parts: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TeachingRecord:
  """One pass of the protocol: probe, teaching, and answers with and without.

  `teaching` is None when the completion held no teaching tag. `num_teaching_
  tokens` counts the text of `teaching` alone. `leaked` and the attempts'
  `correct` are None until graded. `seconds` is the wall time of the taught
  pass, shared evenly among the records of one batch.
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


class Sampler(Protocol):
  """Writes completions with weights that can be replaced."""

  @property
  def version(self) -> int:
    """The step whose weights it holds."""
    ...

  def sample(
    self, prompts: Sequence[Prompt], params: SamplingParams
  ) -> list[list[Completion]]:
    """Draws `params.group_size` completions for each prompt, in order.

    None at all for a prompt that was given up: its completions are missing.
    """
    ...

  def update_weights(self, params: Mapping[str, Any], version: int) -> None:
    """Takes new weights: a nested dict of arrays, known by its paths."""
    ...

  def take_metrics(self) -> Mapping[str, float]:
    """Gives numbers of its work since it was last asked, by name."""
    ...


class Score(Protocol):
  """Tells what a model thinks of tokens that others wrote."""

  def __call__(
    self,
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[int]],
    *,
    temperature: float,
  ) -> list[tuple[float, ...] | None]:
    """Gives each token's log-probability after its prompt, in nats.

    One completion per prompt, in order; `temperature` divides the logits. None
    where both together are longer than the model's context.
    """
    ...


class RewardFn(Protocol):
  """Rewards a batch of records, all at once, in order."""

  def __call__(self, records: Sequence[TeachingRecord]) -> list[Reward]:
    """Returns one reward per record."""
    ...


class OnFirstProcess(Protocol):
  """Does once, for all processes of a run, what must not be done by each."""

  def __call__(self, make: Callable[[], _Json]) -> _Json:
    """Gives all of them what `make` makes in the first; JSON."""
    ...


def to_json_line(record: Any) -> str:  # Any: each record class of this module.
  """Writes a record as one line of JSON, without the newline."""
  return json.dumps(
    dataclasses.asdict(record), ensure_ascii=False, allow_nan=False
  )


def teaching_record(
  fields: Mapping[str, Any],  # Any: JSON.
) -> TeachingRecord:
  """Reads back what `to_json_line` wrote of a `TeachingRecord`.

  Raises:
    KeyError, TypeError or ValueError: if it is something else.
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
    "reward": None if reward is None else Reward(**reward),
  }
  return TeachingRecord(**{**fields, **nested})


def completion(fields: Mapping[str, Any]) -> Completion:  # Any: JSON.
  """Reads back what `dataclasses.asdict` gave of a completion.

  Raises:
    KeyError, TypeError or ValueError: if it is something else.
  """
  return Completion(**_tuples(fields))


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:  # Any: JSON.
  """Makes JSON's lists the tuples they were."""
  return {
    name: tuple(value) if isinstance(value, list) else value
    for name, value in fields.items()
  }
