# SPDX-License-Identifier: Apache-2.0
"""Typed client for one rollout server, which validates every response.

Each call has a wall-clock deadline: a read timeout would never expire on a
server that sends one byte per second. Transient failures are retried with the
same request id, so that the server returns its cached answer instead of
generating again.
"""

import asyncio
import collections
from collections.abc import Callable
import dataclasses
import math
from typing import TypeVar
import urllib.parse

from absl import logging
import httpx2
import pydantic
import stamina

from atlas_jax import errors
from rollout import wire

_Reply = TypeVar("_Reply", bound=pydantic.BaseModel)

# Busy servers (429) are retried until the deadline. Failures are retried only
# a few times, since other servers may be available.
_NUM_TRIES = 3
_MAX_RETRY_AFTER_S = 30.0
_BUSY, _PASSING = 429, (502, 503)
# `_call` logs retries itself.
stamina.instrumentation.set_on_retry_hooks(())
# A log-probability may exceed zero by float32 rounding.
_LOGPROB_SLACK = 1e-4


@dataclasses.dataclass(frozen=True)
class Deadlines:
  """Wall-clock limits of a call in seconds, including retries.

  `generate_s` applies to a generate request, `update_s` to a weight update,
  `control_s` to everything else.
  """

  generate_s: float
  update_s: float
  control_s: float


class UnavailableError(errors.RolloutError):
  """The server did not answer, or its response is invalid."""


class LateError(UnavailableError):
  """The deadline expired; the server may still be working."""


class RefusedError(errors.RolloutError):
  """The server rejected the request; `error` is its error code."""

  def __init__(self, url: str, status: int, refusal: wire.Refusal) -> None:
    super().__init__(
      "A rollout server rejected a request.",
      where=f"{url} ({status})",
      why=f"{refusal.what} {refusal.why}",
      fix=refusal.fix,
    )
    self.status, self.error = status, refusal.error


class _BusyError(Exception):
  """The server is busy; retry after `wait_s`."""

  def __init__(self, wait_s: float | None) -> None:
    super().__init__("its queue is full (429)")
    self.wait_s = wait_s


class _BrokenError(Exception):
  """No response, or an invalid one; `again` if a retry may succeed."""

  def __init__(self, why: str, *, again: bool = True) -> None:
    super().__init__(why)
    self.again = again


class Client:
  """Client of one server. Use it from a single event loop."""

  def __init__(
    self, url: str, *, deadlines: Deadlines, token: str | None
  ) -> None:
    """Creates a client; it connects on the first call.

    Args:
      url: such as `http://127.0.0.1:8765`.
      deadlines: limits of its calls.
      token: sent with every request; None if the server requires none.

    Raises:
      errors.ConfigError: if `url` is invalid.
    """
    self.url, self._deadlines = url.rstrip("/"), deadlines
    _check_url(url)
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    self._http = httpx2.AsyncClient(
      base_url=self.url,
      headers=headers,
      # `_call` enforces deadlines; only connecting has a timeout here.
      timeout=httpx2.Timeout(None, connect=deadlines.control_s),
      # Shorter than the server's keep-alive timeout, so that the server does
      # not close a connection while a request is being sent on it.
      limits=httpx2.Limits(max_connections=None, keepalive_expiry=2.0),
      # A proxy from the environment would see the prompts.
      trust_env=False,
    )

  async def close(self) -> None:
    """Closes the connections."""
    await self._http.aclose()

  async def health(self) -> wire.Health:
    """Returns the server's status.

    Raises:
      UnavailableError: if the engine is not ok.
    """

    def check(reply: wire.Health) -> None:
      if reply.status != "ok":
        raise _BrokenError(f"its engine is {reply.status}", again=False)

    # No retries: callers poll.
    return await self._call(
      "GET", "/health", None, wire.Health, check, num_tries=1
    )

  async def generate(
    self, request: wire.GenerateRequest
  ) -> wire.GenerateResponse:
    """Requests completions and validates them against the request."""
    return await self._call(
      "POST",
      "/generate",
      request,
      wire.GenerateResponse,
      lambda reply: _check_generated(reply, request),
      deadline_s=self._deadlines.generate_s,
    )

  async def probe(self, request_id: str, version: int) -> None:
    """Generates one token: an engine may hang while /health answers."""
    request = wire.GenerateRequest(
      request_id=request_id,
      prompts=[wire.PromptIn(row_id="probe", token_ids=[0])],
      n=1,
      max_tokens=1,
      temperature=1.0,
      top_p=1.0,
      top_k=0,
      seed=0,
      with_text=False,
      version=version,
    )
    await self._call(
      "POST",
      "/generate",
      request,
      wire.GenerateResponse,
      lambda reply: _check_generated(reply, request),
    )

  async def init_communicator(self, request: wire.InitRequest) -> wire.Version:
    """Opens the weight channel or renews it; returns the loaded version."""
    return await self._call("POST", "/init_communicator", request, wire.Version)

  async def update_weights(
    self, request: wire.UpdateRequest
  ) -> wire.UpdateResponse:
    """Loads a version. Not retried: call `version` if there is no answer."""

    def check(reply: wire.UpdateResponse) -> None:
      if reply.version != request.version:
        raise _BrokenError(
          f"loaded version {reply.version}, expected {request.version}"
        )

    return await self._call(
      "POST",
      "/update_weights",
      request,
      wire.UpdateResponse,
      check,
      deadline_s=self._deadlines.update_s,
      num_tries=1,
    )

  async def version(self) -> wire.Version:
    """Returns the version that is loaded."""
    return await self._call("GET", "/version", None, wire.Version)

  async def close_communicator(self, request: wire.CloseRequest) -> None:
    """Closes the weight channel."""
    await self._call("POST", "/close_communicator", request, wire.Done)

  async def _call(
    self,
    method: str,
    path: str,
    body: pydantic.BaseModel | None,
    kind: type[_Reply],
    check: Callable[[_Reply], None] | None = None,
    *,
    deadline_s: float | None = None,
    num_tries: int = _NUM_TRIES,
  ) -> _Reply:
    """Sends a request until it is answered, rejected, or out of time."""
    deadline_s = deadline_s or self._deadlines.control_s
    content = None if body is None else body.model_dump_json().encode()
    failures: list[str] = []
    num_broken = 0

    def wait_s(error: Exception) -> bool | float:
      nonlocal num_broken
      if not isinstance(error, (_BusyError, _BrokenError)):
        return False
      failures.append(str(error))
      if isinstance(error, _BusyError):
        again = True if error.wait_s is None else error.wait_s
      else:
        num_broken += 1
        again = error.again and num_broken < num_tries
      if again is not False:
        logging.info("Retrying %s%s: %s", self.url, path, error)
      return again

    try:
      async with asyncio.timeout(deadline_s):
        async for attempt in stamina.retry_context(
          on=wait_s, attempts=None, timeout=None
        ):
          with attempt:
            reply = await self._once(method, path, content, kind)
            if check is not None:
              check(reply)
            return reply
    except TimeoutError as error:
      failures.append(f"no complete response within {deadline_s:g} s")
      raise self._unavailable(path, failures, LateError) from error
    except (_BrokenError, _BusyError) as error:
      raise self._unavailable(path, failures, UnavailableError) from error
    raise RuntimeError("The retry loop ended without a result or an error.")

  async def _once(
    self, method: str, path: str, content: bytes | None, kind: type[_Reply]
  ) -> _Reply:
    """Sends a request once and parses the response."""
    headers = {} if content is None else {"Content-Type": "application/json"}
    try:
      reply = await self._http.request(
        method, path, content=content, headers=headers
      )
    except httpx2.RequestError as error:
      raise _BrokenError(f"{type(error).__name__} {error}".strip()) from error
    status = reply.status_code
    if status == _BUSY:
      raise _BusyError(_seconds(reply.headers.get("Retry-After", "")))
    try:
      # GET /health returns a `wire.Health` with status 503 as well.
      if status < 300 or kind is wire.Health:
        return kind.model_validate_json(reply.content)
      refusal = wire.Refusal.model_validate_json(reply.content)
    except pydantic.ValidationError as error:
      # Only the location of the error: the input may contain a prompt.
      first = error.errors(include_input=False, include_context=False)[0]
      place = ".".join(str(part) for part in first["loc"]) or "body"
      why = f"malformed response ({status}): {place}: {first['type']}"
      passing = status < 500 or status in _PASSING
      raise _BrokenError(why, again=passing) from error
    if status >= 500:
      why = f"{refusal.what} ({status}) {refusal.why}"
      raise _BrokenError(why, again=status in _PASSING)
    raise RefusedError(self.url, status, refusal)

  def _unavailable(
    self, path: str, failures: list[str], kind: type[UnavailableError]
  ) -> UnavailableError:
    counts = collections.Counter(failures)
    return kind(
      "A rollout server is unavailable.",
      where=f"{self.url}{path}",
      why="; ".join(
        f"{n} times {why}" if n > 1 else why for why, n in counts.items()
      ),
      fix="See its log. Servers are started with python -m scripts.serve.",
    )


def _check_url(url: str) -> None:
  try:
    parts = urllib.parse.urlsplit(url)
    usable = parts.scheme in ("http", "https") and parts.hostname
    usable = usable and (parts.port is None or parts.port > 0)
  except ValueError:
    usable = False
  if not usable:
    raise errors.ConfigError(
      f"Invalid rollout server address {url!r}.",
      where="--config.rollout.policy_urls or student_urls",
      why="It must be an http or https URL with a host.",
      fix="Use an address such as http://127.0.0.1:8765.",
    )


def _seconds(text: str) -> float | None:
  """Parses Retry-After in seconds; returns None for dates."""
  try:
    return min(max(float(text), 0.0), _MAX_RETRY_AFTER_S)
  except ValueError:
    return None


def _check_generated(
  reply: wire.GenerateResponse, request: wire.GenerateRequest
) -> None:
  """Rejects a response that does not match its request."""
  if reply.request_id != request.request_id:
    raise _BrokenError("response has another request_id")
  if request.version not in (None, reply.version):
    raise _BrokenError(
      f"response has version {reply.version}, expected {request.version}",
      again=False,
    )
  groups = [len(group) for group in reply.completions]
  if groups != [request.n] * len(request.prompts):
    raise _BrokenError(
      f"response has {len(groups)} prompts with {sorted(set(groups))} "
      f"completions, expected {len(request.prompts)} with {request.n}"
    )
  for group in reply.completions:
    for completion in group:
      _check_completion(completion, request.max_tokens)


def _check_completion(completion: wire.CompletionOut, max_tokens: int) -> None:
  num_tokens = len(completion.token_ids)
  if num_tokens > max_tokens or min(completion.token_ids, default=0) < 0:
    raise _BrokenError(
      f"{num_tokens} tokens with max_tokens={max_tokens}, or negative ids"
    )
  for logprobs in (completion.logprobs, completion.model_logprobs):
    if logprobs is None:
      continue
    if len(logprobs) != num_tokens:
      raise _BrokenError(f"{len(logprobs)} logprobs for {num_tokens} tokens")
    if not all(math.isfinite(x) and x <= _LOGPROB_SLACK for x in logprobs):
      raise _BrokenError("a logprob is positive or not finite")
