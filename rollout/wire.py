# SPDX-License-Identifier: Apache-2.0
"""Typed messages between trainer and rollout server.

Imported by both sides, so it needs neither jax nor vllm. Unknown fields are
rejected, so that a misspelt one is not silently ignored.
"""

from typing import Annotated, Literal

import pydantic

Role = Literal["policy", "student"]
Engine = Literal["vllm", "jax"]
TokenIds = Annotated[list[int], pydantic.Field(min_length=1)]


class _Message(pydantic.BaseModel):
  model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class PromptIn(_Message):
  """A prompt as token ids or, for manual requests, as text.

  `row_id` appears in errors and, with the seed, determines random numbers.
  """

  row_id: str
  token_ids: TokenIds | None = None
  text: str | None = None


class GenerateRequest(_Message):
  """Requests `n` completions of each prompt.

  A repeated `request_id` returns the cached answer without generating again. If
  `version` is set and not the loaded one, the request is rejected (409).
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
  """Completions by prompt, in order, all sampled from one version.

  `queue_s` is the time in the queue, for example during a weight update.
  """

  request_id: str
  version: int
  queue_s: float
  completions: list[list[CompletionOut]]


class TensorSignature(_Message):
  """Hugging Face name and shape of a weight."""

  name: str
  shape: list[int]


class InitRequest(_Message):
  """The handshake of the weight channel.

  A server whose role, tensors or tokenizer differ rejects it (409) and lists
  the differences. The server loads weights from `weights_root` only. A trainer
  with another `trainer_id` is rejected while the channel is open. The channel
  is closed after `heartbeat_s` without a request, or when `process` (see
  `process_name`) has exited, if it ran on the server's machine.
  """

  trainer_id: str
  process: str
  role: Role
  tensors: list[TensorSignature]
  tokenizer_digest: str
  weights_root: str
  heartbeat_s: Annotated[float, pydantic.Field(gt=0.0)]


class UpdateRequest(_Message):
  """Loads `weights_root/<version>`, which must be newer than the last version.

  `digest` is that of the manifest; the server verifies it.
  """

  trainer_id: str
  version: Annotated[int, pydantic.Field(ge=0)]
  digest: str


class UpdateResponse(_Message):
  """The loaded version, and the seconds spent draining and loading."""

  version: int
  drain_s: float
  load_s: float


class CloseRequest(_Message):
  """Closes the weight channel; the weights stay."""

  trainer_id: str


class Version(_Message):
  """The version that is loaded, and the one being loaded, if any.

  `digest` is that of the manifest, "" for the weights at server start.
  """

  version: int
  digest: str
  loading: int | None = None


class Health(_Message):
  """Status of the server; `ok` if the engine is idle or makes progress.

  `max_model_len` bounds prompt plus completion tokens of each request.
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
  """The number of devices that share one copy of the weights."""

  tensor_parallel_size: int


class Done(_Message):
  """Confirms a request without another result."""

  message: str


class Refusal(_Message):
  """Why a request was rejected or failed; the body of every 4xx and 5xx."""

  error: str
  what: str
  why: str
  fix: str
