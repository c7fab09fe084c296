# SPDX-License-Identifier: Apache-2.0
"""Request handling of the rollout server, independent of HTTP.

Requests are validated, run in the engine and cached by their id. A weight
update closes the gate, waits for running requests, loads the weights and opens
the gate again: each response is sampled from a single version.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
import concurrent.futures
import dataclasses
import pathlib
import reprlib
import time
from typing import Any, Literal, TypeVar

from absl import logging

from atlas_jax import errors, types
from rollout import manifest, wire
from rollout.server import engine as engines
from rollout.server import generation, refusal, weight_channel

_T = TypeVar("_T")
# Answers cached for clients that retry; the newest is kept whatever its size.
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
  """Limits for a single request and for all requests together.

  `max_queue` bounds the completions that are queued or running. A busy engine
  without progress for `hang_s` counts as hung. An update waits at most
  `drain_s` for running requests and `load_s` for the engine to load weights.
  `max_total_body_bytes` bounds all unfinished bodies together, and
  `max_text_chars` the texts of a request, before they are tokenized.
  """

  max_body_bytes: int
  max_total_body_bytes: int
  max_text_chars: int
  max_prompts: int
  max_n: int
  max_tokens: int
  max_queue: int
  hang_s: float
  drain_s: float
  load_s: float


@dataclasses.dataclass(frozen=True)
class _Answer:
  """The finished or pending answer to the request with this digest."""

  digest: str
  task: asyncio.Task[bytes]


@dataclasses.dataclass(frozen=True)
class _Update:
  request: wire.UpdateRequest
  task: asyncio.Task[wire.UpdateResponse]


class Service:
  """An engine with its weight channel and its queue of requests."""

  def __init__(
    self,
    engine: engines.Engine,
    weights: weight_channel.Channel,
    *,
    role: wire.Role,
    tokenizer_digest: str,
    limits: Limits,
  ) -> None:
    """Creates a service with an empty queue."""
    self.engine, self.weights, self.limits = engine, weights, limits
    self._role: wire.Role = role
    self._tokenizer_digest = tokenizer_digest
    # The gate is closed while weights are replaced. Idle means that no request
    # is running in the engine.
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
    # One thread, since tokenizers are not safe to share.
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "requests")

  def health(self) -> wire.Health:
    """Returns the engine's status without sending it a request."""
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
    """Returns the values of GET /metrics by name.

    `busy_seconds_total` counts the time with at least one running request;
    `tokens_per_second` is relative to it. `push_seconds_total` covers
    verifying, draining and loading.
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
    """Increments a total of `metrics`."""
    self._totals[name] += 1

  async def generate(self, request: wire.GenerateRequest, digest: str) -> bytes:
    """Generates completions, or returns the cached answer to the same request.

    If the client disconnects, generation continues; a retry with the same id
    waits for the same result. `digest` is that of the request's body.

    Returns:
      A `wire.GenerateResponse` as JSON.

    Raises:
      refusal.RefusalError: if the request exceeds a limit, a prompt is
        invalid, or the requested version is not the one held.
      errors.RolloutError: if the engine fails.
    """
    answer = self._answers.get(request.request_id)
    if answer is None:
      self._admit(request)
      task = asyncio.create_task(self._with_heartbeat(self._answer(request)))
      answer = _Answer(digest, task)
      self._answers[request.request_id] = answer
      task.add_done_callback(lambda _: self._evict(request.request_id))
    elif answer.digest != digest:
      raise refusal.RefusalError(
        409,
        "request_id",
        what="request_id was already used for a different request.",
        why="The id identifies a request, so that a retry is not generated "
        "twice.",
        fix="Use a new id, such as a random UUID.",
      )
    return await asyncio.shield(answer.task)

  async def reset_prefix_cache(self) -> None:
    """Clears cached keys and values of earlier prompts.

    Raises:
      refusal.RefusalError: if running requests still use them.
    """
    if not await self.engine.reset_prefix_cache():
      raise refusal.RefusalError(
        503,
        "running",
        what="The prefix cache is in use.",
        why=f"{self._num_running} completions are running.",
        fix="Retry when they have finished.",
        retry_after_s=_RETRY_AFTER_S,
      )

  async def update(self, request: wire.UpdateRequest) -> wire.UpdateResponse:
    """Replaces the weights; a repeated call joins the update in progress.

    Raises:
      refusal.RefusalError: if the channel rejects the update, another
        update is in progress, or running requests do not finish in time.
      errors.CheckpointError: if the weights are invalid; nothing changes.
      errors.RolloutError: if loading fails halfway; the server is then dead.
    """
    root = self.weights.accept(request)
    if root is None:
      return wire.UpdateResponse(
        version=request.version, drain_s=0.0, load_s=0.0
      )
    running = self._update
    if running is None or running.task.done():
      task = asyncio.create_task(
        self._with_heartbeat(self._load(request, root))
      )
      running = self._update = _Update(request, task)
    elif running.request != request:
      raise refusal.RefusalError(
        409,
        "busy",
        what=f"Version {running.request.version} is being loaded.",
        why="With two concurrent updates the final version is undefined.",
        fix="Wait until it is loaded, then push again.",
        retry_after_s=_RETRY_AFTER_S,
      )
    return await asyncio.shield(running.task)

  async def _with_heartbeat(self, work: Awaitable[_T]) -> _T:
    """Runs `work`; meanwhile the trainer's heartbeat does not expire."""
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
      # Stays hung after its requests are cancelled, until the next progress.
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
        else "Its process exited, or loading weights failed halfway.",
        fix="Restart the server; see its log for the cause.",
      )

  def _admit(self, request: wire.GenerateRequest) -> None:
    """Validates a request against the limits, and counts it as waiting."""
    self._check_status()
    limits, size = self.limits, len(request.prompts) * request.n
    num_chars = sum(len(prompt.text or "") for prompt in request.prompts)
    for name, value, limit in (
      ("characters of text", num_chars, limits.max_text_chars),
      ("prompts", len(request.prompts), limits.max_prompts),
      ("n", request.n, limits.max_n),
      ("max_tokens", request.max_tokens, limits.max_tokens),
      ("prompts * n", size, limits.max_queue),
    ):
      if value > limit:
        raise refusal.RefusalError(
          422,
          "limit",
          what=f"{name} must be at most {limit}, got {value}.",
          why="The limit keeps one request from occupying the whole server.",
          fix="Send smaller requests, or start the server with a larger limit.",
        )
    queued = self._num_running + self._num_waiting
    if queued + size > limits.max_queue:
      raise refusal.RefusalError(
        429,
        "queue_full",
        what=f"The queue is full: {queued} completions queued, {size} "
        "requested.",
        why=f"--max_queue is {limits.max_queue}.",
        fix="Retry later, or add servers.",
        retry_after_s=_RETRY_AFTER_S,
      )
    self._num_waiting += size

  async def _answer(self, request: wire.GenerateRequest) -> bytes:
    """Tokenizes, waits at the gate, generates and validates completions."""
    size = len(request.prompts) * request.n
    try:
      prompts = await self._in_thread(
        generation.to_prompts, request, self.engine
      )
      asked = time.monotonic()
      while not self._gate.is_set():
        await self._gate.wait()
    finally:
      self._num_waiting -= size
    # No await between the gate and here, so no update can start in between.
    self._check_status()
    version = self.weights.held.version
    if request.version not in (None, version):
      raise refusal.RefusalError(
        409,
        "version",
        what=f"Version {request.version} requested, but {version} is loaded.",
        why="The server was restarted, or missed an update.",
        fix="Push the version again before sampling from it.",
      )
    started = time.monotonic()
    queue_s = started - asked
    completions = await self._run(prompts, request, size)
    seconds = time.monotonic() - started
    response = await self._in_thread(
      generation.to_json, request, version, queue_s, completions, self.engine
    )
    num_tokens = sum(len(c.token_ids) for group in completions for c in group)
    self._totals["generated_tokens_total"] += num_tokens
    self._totals["completions_total"] += size
    self._totals["queue_seconds_total"] += queue_s
    logging.info(
      "Generated %s: %d prompts x %d, %d tokens in %.2f s (%.0f/s), version "
      "%d, queued %.2f s.",
      reprlib.repr(request.request_id),
      len(prompts),
      request.n,
      num_tokens,
      seconds,
      num_tokens / max(seconds, 1e-9),
      version,
      queue_s,
    )
    return response

  async def _in_thread(
    self,
    function: Callable[..., _T],
    *args: Any,  # Any: the arguments of the function.
  ) -> _T:
    """Runs a function off the event loop, which must answer /health."""
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(self._thread, function, *args)

  async def _run(
    self,
    prompts: Sequence[types.Prompt],
    request: wire.GenerateRequest,
    size: int,
  ) -> list[list[wire.CompletionOut]]:
    """Runs the engine; cancels the request once the engine hangs."""
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
    """Verifies the files, closes the gate, drains, loads, opens the gate."""
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
      "Loaded weights version=%d in %.3f s: verify %.3f s, drain %.3f s, load "
      "%.3f s.",
      response.version,
      loaded - asked,
      started - asked,
      response.drain_s,
      response.load_s,
    )
    return response

  async def _drain(self) -> None:
    try:
      async with asyncio.timeout(self.limits.drain_s):
        await self._idle.wait()
    except TimeoutError as error:
      raise refusal.RefusalError(
        503,
        "draining",
        what=f"{self._num_running} completions are still running.",
        why=f"They did not finish within --drain_s={self.limits.drain_s:g} s.",
        fix="Push again; the weights are unchanged.",
        retry_after_s=_RETRY_AFTER_S,
      ) from error

  async def _replace(self, directory: pathlib.Path, version: int) -> None:
    """Loads weights; after a failure halfway the service is broken."""
    whole = False
    try:
      async with asyncio.timeout(self.limits.load_s):
        await self.engine.load(directory, version)
      whole = True
    except errors.CheckpointError:
      whole = True  # The old weights are intact.
      raise
    except TimeoutError as error:
      raise errors.RolloutError(
        f"Loading version {version} timed out.",
        where=str(directory),
        why=f"It did not finish within --load_s={self.limits.load_s:g} s.",
        fix="Restart the server, with a larger --load_s if disks are slow.",
      ) from error
    finally:
      self._broken = self._broken or not whole

  def _evict(self, request_id: str) -> None:
    """Drops a failed answer, so that it can be retried, and old answers."""
    task = self._answers[request_id].task
    error = None if task.cancelled() else task.exception()
    if task.cancelled() or error is not None:
      del self._answers[request_id]
      if not isinstance(error, refusal.RefusalError):
        self.count("failed_requests_total")
      return
    done = [k for k, answer in self._answers.items() if answer.task.done()]
    num_bytes = sum(len(self._answers[k].task.result()) for k in done)
    for key in done[:-1]:
      if len(done) <= _MAX_ANSWERS and num_bytes <= _MAX_ANSWER_BYTES:
        break
      num_bytes -= len(self._answers.pop(key).task.result())
      done.remove(key)
