# SPDX-License-Identifier: Apache-2.0
"""Typed messages between trainer and rollout server.

Imported by both sides, so it needs neither jax nor vllm. Unknown fields are
rejected, so that a misspelt one is not silently ignored.
"""

from typing import Annotated, Literal
import uuid

import pydantic

Role = Literal["policy", "student"]
Engine = Literal["vllm", "jax"]
# An invalid list stops at its first error, as there could be a million.
TokenIds = Annotated[list[int], pydantic.Field(min_length=1, fail_fast=True)]
# A step of training; also the name of a directory.
Step = Annotated[int, pydantic.Field(ge=0, lt=2**63)]
# Identifies a trainer, a process or a manifest.
Name = Annotated[str, pydantic.Field(max_length=256)]
Path = Annotated[str, pydantic.Field(max_length=4096, pattern=r"^[^\x00]*$")]

# Commas in a request, which bound its numbers and so the time to parse it.
MAX_COMMAS = 2**19
# A longer silence of a trainer closes its weight channel.
MAX_HEARTBEAT_S = 600.0


class _Message(pydantic.BaseModel):
  model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class PromptIn(_Message):
  """A prompt: either `token_ids` or `text`, to which no template is applied.

  `row_id` appears in errors and, with the seed, determines random numbers; by
  default it is the number of the prompt in its request.
  """

  row_id: str = ""
  token_ids: TokenIds | None = None
  text: str | None = None


class GenerateRequest(_Message):
  """Requests `n` completions of each prompt.

  A repeated `request_id` returns the cached answer without generating again; by
  default it is unique. If `version` is set and not the loaded one, the request
  is rejected (409). A `temperature` of 0 is greedy; a `top_k` of 0 and a
  `top_p` of 1 keep all tokens. The same `seed` samples the same completions.
  `with_text` adds the decoded text to each completion.
  """

  prompts: Annotated[
    list[PromptIn], pydantic.Field(min_length=1, fail_fast=True)
  ]
  max_tokens: Annotated[int, pydantic.Field(ge=1)]
  n: Annotated[int, pydantic.Field(ge=1)] = 1
  temperature: Annotated[
    float, pydantic.Field(ge=0.0, le=100.0, allow_inf_nan=False)
  ] = 1.0
  top_p: Annotated[
    float, pydantic.Field(gt=0.0, le=1.0, allow_inf_nan=False)
  ] = 1.0
  top_k: Annotated[int, pydantic.Field(ge=0, lt=2**31)] = 0
  seed: Annotated[int, pydantic.Field(ge=0, lt=2**32)] = 0
  with_text: bool = True
  version: Step | None = None
  request_id: Annotated[
    Name, pydantic.Field(default_factory=lambda: uuid.uuid4().hex)
  ]


class CompletionOut(_Message):
  """See `types.Completion`; `model_logprobs` is null where unknown.

  `text` is null unless it was requested.
  """

  token_ids: list[int]
  logprobs: list[float]
  model_logprobs: list[float] | None
  finish_reason: Literal["stop", "length"]
  text: str | None = None


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
  shape: Annotated[list[int], pydantic.Field(fail_fast=True)]


class InitRequest(_Message):
  """The handshake of the weight channel.

  A server whose role, tensors or tokenizer differ rejects it (409) and lists
  the differences. The server loads weights from `weights_root` only. A trainer
  with another `trainer_id` is rejected while the channel is open. The channel
  is closed after `heartbeat_s` without a request, or when `process` (see
  `process_name`) has exited, if it ran on the server's machine.
  """

  trainer_id: Name
  process: Name
  role: Role
  tensors: Annotated[list[TensorSignature], pydantic.Field(fail_fast=True)]
  tokenizer_digest: Name
  weights_root: Path
  heartbeat_s: Annotated[float, pydantic.Field(gt=0.0, le=MAX_HEARTBEAT_S)]


class UpdateRequest(_Message):
  """Loads `weights_root/<version>`, which must be newer than the last version.

  `digest` is that of the manifest; the server verifies it.
  """

  trainer_id: Name
  version: Step
  digest: Name


class UpdateResponse(_Message):
  """The loaded version, and the seconds spent draining and loading."""

  version: int
  drain_s: float
  load_s: float


class CloseRequest(_Message):
  """Closes the weight channel; the weights stay."""

  trainer_id: Name


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
