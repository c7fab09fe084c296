# SPDX-License-Identifier: Apache-2.0
"""What a rollout server does, apart from HTTP.

Requests are admitted, run in the engine, and remembered by their id. An update
of the weights closes the gate, lets what runs come to its end, loads, and opens
the gate again: every answer is written by one version from start to end.
"""

import asyncio
from collections.abc import Awaitable, Sequence
import dataclasses
import hashlib
import math
import pathlib
import reprlib
import time
from typing import Literal, TypeVar

from absl import logging

from atlas_jax import errors, types
from rollout import manifest, wire
from rollout.server import engine as engines
from rollout.server import weight_channel

_T = TypeVar("_T")
# Answers kept for those who lost theirs; the newest is kept whatever its size.
_MAX_ANSWERS, _MAX_ANSWER_BYTES = 1024, 256 * 2**20
_RETRY_AFTER_S = 1
_TOTALS = (
  "requests_total",
  "refused_requests_total",
  "failed_requests_total",
  "completions_total",
  "generated_tokens_total",
  "queue_seconds_total",
  "busy_seconds_total",
  "updates_total",
  "push_seconds_total",
  "drain_seconds_total",
  "load_seconds_total",
)


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one request, and all of them together, may ask for.

  `max_queue` bounds the completions admitted and not yet done. An engine that
  is busy and silent for `hang_s` counts as hung. An update waits `drain_s` for
  what runs, and `load_s` for the engine.
  """

  max_body_bytes: int
  max_prompts: int
  max_n: int
  max_tokens: int
  max_queue: int
  hang_s: float
  drain_s: float
  load_s: float


@dataclasses.dataclass(frozen=True)
class _Answer:
  """What is, or will be, the answer to a request with this digest."""

  digest: str
  task: asyncio.Task[bytes]


@dataclasses.dataclass(frozen=True)
class _Update:
  request: wire.UpdateRequest
  task: asyncio.Task[wire.UpdateResponse]


class Service:
  """One engine, its weight channel and its requests."""

  def __init__(
    self,
    engine: engines.Engine,
    weights: weight_channel.Channel,
    *,
    role: wire.Role,
    tokenizer_digest: str,
    limits: Limits,
  ) -> None:
    """Begins with nothing to do."""
    self.engine, self.weights, self.limits = engine, weights, limits
    self._role: wire.Role = role
    self._tokenizer_digest = tokenizer_digest
    # The gate is closed while weights are replaced; idle: nothing runs.
    self._gate, self._idle = asyncio.Event(), asyncio.Event()
    self._gate.set()
    self._idle.set()
    self._num_waiting = self._num_running = 0
    self._busy_since_s = 0.0
    self._hung_since_s: float | None = None
    self._broken = False
    self._answers: dict[str, _Answer] = {}
    self._update: _Update | None = None
    self._totals: dict[str, float] = {name: 0.0 for name in _TOTALS}

  def health(self) -> wire.Health:
    """Tells how the engine is, without asking it to do anything."""
    return wire.Health(
      status=self._status(),
      role=self._role,
      engine=self.engine.facts.name,
      model=self.engine.facts.model,
      max_model_len=self.engine.facts.max_model_len,
      tokenizer_digest=self._tokenizer_digest,
      version=self.weights.held.version,
      num_running=self._num_running,
      num_waiting=self._num_waiting,
    )

  def metrics(self) -> dict[str, float]:
    """Gives the numbers of GET /metrics, by name.

    Busy are the seconds in which something was written, and of these are the
    tokens per second. A push is checked, then drained for, then loaded.
    """
    busy_s = self._totals["busy_seconds_total"]
    if self._num_running:
      busy_s += time.monotonic() - self._busy_since_s
    tokens = self._totals["generated_tokens_total"]
    return {
      "up": float(self._status() == "ok"),
      "version": self.weights.held.version,
      "trainer_connected": float(self.weights.trainer_id is not None),
      "running_completions": self._num_running,
      "waiting_completions": self._num_waiting,
      **self._totals,
      "busy_seconds_total": busy_s,
      "tokens_per_second": tokens / busy_s if busy_s else 0.0,
      **{f"engine_{k}": v for k, v in self.engine.metrics().items()},
    }

  def count(self, name: str) -> None:
    """Adds one to a total of `metrics`."""
    self._totals[name] += 1

  async def generate(self, request: wire.GenerateRequest) -> bytes:
    """Generates, or finds what the same request generated already.

    Who asked may go away: the work goes on, and asking again joins it.

    Returns:
      A `wire.GenerateResponse` as JSON.

    Raises:
      channel.RefusalError: if a limit, a prompt or the version is in the way.
      errors.RolloutError: if the engine fails.
    """
    digest = hashlib.sha256(request.model_dump_json().encode()).hexdigest()
    answer = self._answers.get(request.request_id)
    if answer is None:
      prompts = self._admit(request)
      task = asyncio.create_task(self._working(self._answer(request, prompts)))
      answer = _Answer(digest, task)
      self._answers[request.request_id] = answer
      task.add_done_callback(lambda _: self._trim(request.request_id))
    elif answer.digest != digest:
      raise weight_channel.RefusalError(
        409,
        "request_id",
        what="This request_id was used for another request.",
        why="An id names one request, so that a repeated one is not done "
        "twice.",
        fix="Use a new id, such as a random UUID.",
      )
    return await asyncio.shield(answer.task)

  async def update(self, request: wire.UpdateRequest) -> wire.UpdateResponse:
    """Replaces the weights; asking again while it lasts joins it.

    Raises:
      channel.RefusalError: if the channel refuses it, or what runs does not
        come to its end in time.
      errors.CheckpointError: if the weights cannot be used.
      errors.RolloutError: if loading failed halfway; the server is dead then.
    """
    root = self.weights.accept(request)
    if root is None:
      return wire.UpdateResponse(
        version=request.version, drain_s=0.0, load_s=0.0
      )
    running = self._update
    if running is None or running.task.done():
      task = asyncio.create_task(self._working(self._load(request, root)))
      running = self._update = _Update(request, task)
    elif running.request != request:
      raise weight_channel.RefusalError(
        409,
        "busy",
        what=f"Version {running.request.version} is being loaded.",
        why="Two updates at once would leave it open which one holds.",
        fix="Wait for it, then push again.",
        retry_after_s=_RETRY_AFTER_S,
      )
    return await asyncio.shield(running.task)

  async def _working(self, work: Awaitable[_T]) -> _T:
    """Works for a trainer, which is not silent as long as it waits."""
    with self.weights.working():
      return await work

  def _status(self) -> Literal["ok", "hung", "dead"]:
    if self._broken or not self.engine.is_alive:
      return "dead"
    progress_s = self.engine.last_progress_s
    if self._hung_since_s is not None and progress_s > self._hung_since_s:
      self._hung_since_s = None
    silent_s = time.monotonic() - max(progress_s, self._busy_since_s)
    if self._num_running and silent_s > self.limits.hang_s:
      # Sticks once its requests are given up, until the engine moves again.
      self._hung_since_s = time.monotonic()
    return "ok" if self._hung_since_s is None else "hung"

  def _check_status(self) -> None:
    status = self._status()
    if status != "ok":
      raise errors.RolloutError(
        f"The engine is {status}.",
        where=f"{self.engine.facts.name} engine",
        why=f"It made no progress for {self.limits.hang_s:g} s."
        if status == "hung"
        else "Its process ended, or loading weights failed halfway.",
        fix="Restart the server; its log tells more.",
      )

  def _admit(self, request: wire.GenerateRequest) -> list[types.Prompt]:
    """Holds a request to the limits, before anything is done for it."""
    self._check_status()
    limits, size = self.limits, len(request.prompts) * request.n
    for name, value, limit in (
      ("request_id", len(request.request_id), 256),
      ("prompts", len(request.prompts), limits.max_prompts),
      ("n", request.n, limits.max_n),
      ("max_tokens", request.max_tokens, limits.max_tokens),
      ("prompts * n", size, limits.max_queue),
    ):
      if value > limit:
        raise weight_channel.RefusalError(
          422,
          "limit",
          what=f"{name} is {value}; this server takes at most {limit}.",
          why="A limit keeps one request from taking all there is.",
          fix="Ask for less at once, or start the server with a larger limit.",
        )
    queued = self._num_running + self._num_waiting
    if queued + size > limits.max_queue:
      raise weight_channel.RefusalError(
        429,
        "queue_full",
        what=f"{queued} completions are queued; {size} more do not fit.",
        why=f"--max_queue is {limits.max_queue}.",
        fix="Try again later, or add servers.",
        retry_after_s=_RETRY_AFTER_S,
      )
    return [
      self._prompt(prompt, request.max_tokens) for prompt in request.prompts
    ]

  def _prompt(self, prompt: wire.PromptIn, max_tokens: int) -> types.Prompt:
    """Turns a prompt into token ids that fit into the model."""
    row = reprlib.repr(prompt.row_id)
    if (prompt.token_ids is None) == (prompt.text is None):
      raise _bad_prompt(row, "It needs either token_ids or text.")
    token_ids = prompt.token_ids
    if token_ids is None:
      token_ids = self.engine.tokenize(prompt.text or "")
    limit = self.engine.facts.max_model_len
    if not 0 < len(token_ids) <= limit - max_tokens:
      raise _bad_prompt(
        row,
        f"{len(token_ids)} tokens and {max_tokens} new ones do not fit into "
        f"the {limit} of the model.",
      )
    if min(token_ids) < 0 or max(token_ids) >= self.engine.facts.vocab_size:
      raise _bad_prompt(
        row, f"Token ids go from 0 to {self.engine.facts.vocab_size - 1}."
      )
    return types.Prompt(prompt.row_id, prompt.text or "", tuple(token_ids))

  async def _answer(
    self, request: wire.GenerateRequest, prompts: Sequence[types.Prompt]
  ) -> bytes:
    """Waits at the gate, generates, and checks what came out."""
    size = len(prompts) * request.n
    self._num_waiting += size
    asked = time.monotonic()
    try:
      while not self._gate.is_set():
        await self._gate.wait()
    finally:
      self._num_waiting -= size
    # No await up to here from the gate: no update can come in between.
    self._check_status()
    version = self.weights.held.version
    if request.version not in (None, version):
      raise weight_channel.RefusalError(
        409,
        "version",
        what=f"Version {request.version} is asked for, {version} is held.",
        why="The server was restarted, or an update did not reach it.",
        fix="Push the version again before sampling from it.",
      )
    started = time.monotonic()
    queue_s = started - asked
    completions = await self._run(prompts, request, size)
    _check_completions(completions, request)
    num_tokens = sum(len(c.token_ids) for group in completions for c in group)
    seconds = time.monotonic() - started
    self._totals["generated_tokens_total"] += num_tokens
    self._totals["completions_total"] += size
    self._totals["queue_seconds_total"] += queue_s
    logging.info(
      "%s: %d prompts x %d, %d tokens in %.2f s (%.0f/s), version %d, after "
      "%.2f s in the queue.",
      *(reprlib.repr(request.request_id), len(prompts), request.n, num_tokens),
      *(seconds, num_tokens / max(seconds, 1e-9), version, queue_s),
    )
    response = wire.GenerateResponse(
      request_id=request.request_id,
      version=version,
      queue_s=queue_s,
      completions=completions,
    )
    return response.model_dump_json().encode()

  async def _run(
    self,
    prompts: Sequence[types.Prompt],
    request: wire.GenerateRequest,
    size: int,
  ) -> list[list[wire.CompletionOut]]:
    """Runs the engine, and gives up on it once it hangs."""
    params = types.SamplingParams(
      group_size=request.n,
      max_completion_tokens=request.max_tokens,
      temperature=request.temperature,
      top_p=request.top_p,
      top_k=request.top_k,
      seed=request.seed,
    )
    if not self._num_running:
      self._busy_since_s = time.monotonic()
    self._num_running += size
    self._idle.clear()
    work = asyncio.ensure_future(self.engine.generate(prompts, params))
    try:
      while not work.done():
        await asyncio.wait({work}, timeout=min(1.0, self.limits.hang_s / 2))
        if not work.done():
          self._check_status()
      return work.result()
    finally:
      work.cancel()
      self._num_running -= size
      if not self._num_running:
        self._idle.set()
        busy_s = time.monotonic() - self._busy_since_s
        self._totals["busy_seconds_total"] += busy_s

  async def _load(
    self, request: wire.UpdateRequest, root: pathlib.Path
  ) -> wire.UpdateResponse:
    """Checks every byte, closes the gate, waits, loads, and opens it."""
    asked = time.monotonic()
    with self.weights.loading(request.version):
      directory = await asyncio.to_thread(
        manifest.verify,
        root,
        version=request.version,
        digest=request.digest,
        shapes=self.weights.shapes,
      )
      started = time.monotonic()
      self._gate.clear()
      try:
        await self._drain()
        drained = time.monotonic()
        await self._replace(directory, request.version)
        self.weights.publish(request)
      finally:
        self._gate.set()
    loaded = time.monotonic()
    response = wire.UpdateResponse(
      version=request.version,
      drain_s=drained - started,
      load_s=loaded - drained,
    )
    self._totals["updates_total"] += 1
    self._totals["push_seconds_total"] += loaded - asked
    self._totals["drain_seconds_total"] += response.drain_s
    self._totals["load_seconds_total"] += response.load_s
    logging.info(
      "Weights of version %d in %.3f s: checked in %.3f s, drained in %.3f s, "
      "loaded in %.3f s.",
      *(response.version, loaded - asked, started - asked),
      *(response.drain_s, response.load_s),
    )
    return response

  async def _drain(self) -> None:
    try:
      async with asyncio.timeout(self.limits.drain_s):
        await self._idle.wait()
    except TimeoutError as error:
      raise weight_channel.RefusalError(
        503,
        "draining",
        what=f"{self._num_running} completions are still being written.",
        why=f"An update waits --drain_s={self.limits.drain_s:g} s for them.",
        fix="Push again; nothing was changed.",
        retry_after_s=_RETRY_AFTER_S,
      ) from error

  async def _replace(self, directory: pathlib.Path, version: int) -> None:
    """Loads; a failure halfway leaves weights nobody may sample from."""
    whole = False
    try:
      async with asyncio.timeout(self.limits.load_s):
        await self.engine.load(directory, version)
      whole = True
    except errors.CheckpointError:
      whole = True  # The old weights, but whole.
      raise
    except TimeoutError as error:
      raise errors.RolloutError(
        f"Loading version {version} took too long.",
        where=str(directory),
        why=f"It did not end within --load_s={self.limits.load_s:g} s.",
        fix="Restart the server, with a larger --load_s if disks are slow.",
      ) from error
    finally:
      self._broken = self._broken or not whole

  def _trim(self, request_id: str) -> None:
    """Forgets a failed answer, so that it can be tried again, and old ones."""
    task = self._answers[request_id].task
    if task.cancelled() or task.exception() is not None:
      del self._answers[request_id]
      self.count("failed_requests_total")
      return
    done = [k for k, answer in self._answers.items() if answer.task.done()]
    num_bytes = sum(len(self._answers[k].task.result()) for k in done)
    for key in done[:-1]:
      if len(done) <= _MAX_ANSWERS and num_bytes <= _MAX_ANSWER_BYTES:
        break
      num_bytes -= len(self._answers.pop(key).task.result())
      done.remove(key)


def _check_completions(
  completions: Sequence[Sequence[wire.CompletionOut]],
  request: wire.GenerateRequest,
) -> None:
  """Refuses to pass on numbers that are none."""
  for prompt, group in zip(request.prompts, completions, strict=True):
    for completion in group:
      numbers = [*completion.logprobs, *(completion.model_logprobs or ())]
      if not all(map(math.isfinite, numbers)):
        raise errors.RolloutError(
          "The engine gave log-probabilities that are not finite.",
          where=f"row {reprlib.repr(prompt.row_id)}",
          why="The weights, or their arithmetic in this dtype, overflow.",
          fix="Start the server with --dtype=float32, or go back to earlier "
          "weights.",
        )


def _bad_prompt(row: str, why: str) -> weight_channel.RefusalError:
  return weight_channel.RefusalError(
    422,
    "prompt",
    what=f"The prompt of row {row} cannot be sampled.",
    why=why,
    fix="Shorten or mend this row, or lower max_tokens.",
  )
