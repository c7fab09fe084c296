# SPDX-License-Identifier: Apache-2.0
"""What trainer and rollout server say to each other, as typed messages.

Imported by both sides, so it needs neither jax nor vllm. Unknown fields are
refused: a misspelt one must not be ignored.
"""

from typing import Annotated, Literal

import pydantic

Role = Literal["policy", "student"]
Engine = Literal["vllm", "jax"]
TokenIds = Annotated[list[int], pydantic.Field(min_length=1)]


class _Message(pydantic.BaseModel):
  model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class PromptIn(_Message):
  """A prompt by its token ids or, for a person with curl, by its text.

  `row_id` names it in errors and, with the seed, fixes its random numbers.
  """

  row_id: str
  token_ids: TokenIds | None = None
  text: str | None = None


class GenerateRequest(_Message):
  """`n` completions of each prompt.

  The same `request_id` again is the same request: it is answered, not
  generated, a second time. With `version`, completions of other weights are
  refused (409).
  """

  request_id: str
  prompts: Annotated[list[PromptIn], pydantic.Field(min_length=1)]
  n: Annotated[int, pydantic.Field(ge=1)]
  max_tokens: Annotated[int, pydantic.Field(ge=1)]
  temperature: Annotated[float, pydantic.Field(ge=0.0)]
  top_p: Annotated[float, pydantic.Field(gt=0.0, le=1.0)]
  top_k: Annotated[int, pydantic.Field(ge=0)]
  seed: int
  version: int | None = None


class CompletionOut(_Message):
  """See `types.Completion`; `model_logprobs` is null where unknown."""

  token_ids: list[int]
  logprobs: list[float]
  model_logprobs: list[float] | None
  finish_reason: Literal["stop", "length"]


class GenerateResponse(_Message):
  """Completions by prompt, in order, all written by one version.

  `queue_s` is how long the request waited for its turn: for new weights, say.
  """

  request_id: str
  version: int
  queue_s: float
  completions: list[list[CompletionOut]]


class TensorSignature(_Message):
  """A weight by its Hugging Face name, without its values."""

  name: str
  shape: list[int]


class InitRequest(_Message):
  """The handshake of the weight channel.

  A server whose role, tensors or tokenizer differ refuses it (409) with a
  table. `weights_root` is the only directory it will ever load from.
  `trainer_id` is told apart from a second trainer's, which is refused while the
  first is alive; `heartbeat_s` without a word from it ends the channel, and so
  does the end of its `process` (see `lease`) if that ran on this machine.
  """

  trainer_id: str
  process: str
  role: Role
  tensors: list[TensorSignature]
  tokenizer_digest: str
  weights_root: str
  heartbeat_s: Annotated[float, pydantic.Field(gt=0.0)]


class UpdateRequest(_Message):
  """Loads `weights_root/<version>`; the version must be a newer one.

  `digest` is that of the manifest, so that neither side can mean another one.
  """

  trainer_id: str
  version: Annotated[int, pydantic.Field(ge=0)]
  digest: str


class UpdateResponse(_Message):
  """The version now held, and the seconds spent waiting and loading."""

  version: int
  drain_s: float
  load_s: float


class CloseRequest(_Message):
  """Ends the weight channel; the weights stay."""

  trainer_id: str


class Version(_Message):
  """What the server holds, and what it is loading, if anything.

  `digest` is that of the manifest, "" at the start.
  """

  version: int
  digest: str
  loading: int | None = None


class Health(_Message):
  """`ok` only if the engine made progress or has nothing to do.

  `model` and `max_model_len` are what a client must know before it sends.
  """

  status: Literal["ok", "hung", "dead"]
  role: Role
  engine: Engine
  model: str
  max_model_len: int
  tokenizer_digest: str
  version: int
  num_running: int
  num_waiting: int


class TensorParallelSize(_Message):
  """The name of the field is the original's."""

  tensor_parallel_size: int


class Done(_Message):
  """Something was done that has nothing else to tell."""

  message: str


class Refusal(_Message):
  """Why a request was not carried out; the body of every 4xx and 5xx."""

  error: str
  what: str
  why: str
  fix: str
