# SPDX-License-Identifier: Apache-2.0
"""Calls one rollout server, and believes nothing it has not checked.

Each call has a deadline on the clock, not on the silence between two bytes: a
server that sends one byte a second would never be silent. What may succeed the
second time is sent again with the same request id, so that a generation whose
answer was lost is answered, not repeated.
"""

import asyncio
import collections
from collections.abc import Callable
import dataclasses
import math
import os
from typing import TypeVar
import urllib.parse

from absl import logging
import httpx2
import pydantic
import stamina

from atlas_jax import errors
from rollout import wire

TOKEN_VARIABLE = "ATLAS_ROLLOUT_TOKEN"
ADMIN_TOKEN_VARIABLE = "ATLAS_ROLLOUT_ADMIN_TOKEN"

_Reply = TypeVar("_Reply", bound=pydantic.BaseModel)

# A server that is asked to wait is asked again for as long as the deadline
# allows; one whose answers break is given up soon, as others may be well.
_NUM_TRIES = 3
_MAX_RETRY_AFTER_S = 30.0
_BUSY, _PASSING = 429, (502, 503)
# What is tried again is told by `_call`, in one line of ours.
stamina.instrumentation.set_on_retry_hooks(())
# A log-probability may exceed zero by what float32 rounds.
_LOGPROB_SLACK = 1e-4


@dataclasses.dataclass(frozen=True)
class Deadlines:
  """Seconds of wall-clock time that a call may take, repetitions included.

  `generate_s` is for one request of completions, `update_s` for one push of
  weights, `control_s` for everything else.
  """

  generate_s: float
  update_s: float
  control_s: float


class UnavailableError(errors.RolloutError):
  """The server did not answer in time, or what it answered is broken."""


class LateError(UnavailableError):
  """The deadline passed; the server may still be at it."""


class RefusedError(errors.RolloutError):
  """The server answered, and its answer is no; `error` is its word for it."""

  def __init__(self, url: str, status: int, refusal: wire.Refusal) -> None:
    super().__init__(
      "A rollout server refused what it was asked.",
      where=f"{url} ({status})",
      why=f"{refusal.what} {refusal.why}",
      fix=refusal.fix,
    )
    self.status, self.error = status, refusal.error


class _BusyError(Exception):
  """The server asks to be left alone for `wait_s`."""

  def __init__(self, wait_s: float | None) -> None:
    super().__init__("its queue is full (429)")
    self.wait_s = wait_s


class _BrokenError(Exception):
  """No answer, or one that cannot be true; `again` if it may pass."""

  def __init__(self, why: str, *, again: bool = True) -> None:
    super().__init__(why)
    self.again = again


class Client:
  """One server, by its typed messages. Belongs to one event loop."""

  def __init__(
    self, url: str, *, deadlines: Deadlines, token: str | None
  ) -> None:
    """Connects to nothing yet.

    Args:
      url: such as `http://127.0.0.1:8765`.
      deadlines: of its calls.
      token: sent with every request; None if the server asks for none.

    Raises:
      errors.ConfigError: if `url` is none.
    """
    self.url, self._deadlines = url.rstrip("/"), deadlines
    _check_url(url)
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    self._http = httpx2.AsyncClient(
      base_url=self.url,
      headers=headers,
      # Deadlines are kept by `_call`; only a black hole is noticed here.
      timeout=httpx2.Timeout(None, connect=deadlines.control_s),
      # Shorter than a server keeps an idle connection: neither may close one
      # just as the other sends.
      limits=httpx2.Limits(max_connections=None, keepalive_expiry=2.0),
      # A proxy from the environment would see the prompts.
      trust_env=False,
    )

  async def close(self) -> None:
    """Closes the connections."""
    await self._http.aclose()

  async def health(self) -> wire.Health:
    """Asks how the server is; one that is unwell counts as unavailable."""

    def check(reply: wire.Health) -> None:
      if reply.status != "ok":
        raise _BrokenError(f"its engine is {reply.status}", again=False)

    # Asked again and again anyway, by whoever waits for the server.
    return await self._call(
      "GET", "/health", None, wire.Health, check, num_tries=1
    )

  async def generate(
    self, request: wire.GenerateRequest
  ) -> wire.GenerateResponse:
    """Asks for completions, and checks that they are what was asked for."""
    return await self._call(
      "POST",
      "/generate",
      request,
      wire.GenerateResponse,
      lambda reply: _check_generated(reply, request),
      deadline_s=self._deadlines.generate_s,
    )

  async def probe(self, request_id: str, version: int) -> None:
    """Has a token written: an engine may hang while all else answers."""
    request = wire.GenerateRequest(
      request_id=request_id,
      prompts=[wire.PromptIn(row_id="probe", token_ids=[0])],
      n=1,
      max_tokens=1,
      temperature=1.0,
      top_p=1.0,
      top_k=0,
      seed=0,
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
    """Opens the weight channel, or keeps it open; tells what is held."""
    return await self._call("POST", "/init_communicator", request, wire.Version)

  async def update_weights(
    self, request: wire.UpdateRequest
  ) -> wire.UpdateResponse:
    """Has a version loaded. Sent once: ask `version` if it is not answered."""

    def check(reply: wire.UpdateResponse) -> None:
      if reply.version != request.version:
        raise _BrokenError(
          f"it loaded version {reply.version}, not {request.version}"
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
    """Asks which weights are held."""
    return await self._call("GET", "/version", None, wire.Version)

  async def close_communicator(self, request: wire.CloseRequest) -> None:
    """Gives the weight channel up."""
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
    """Calls until there is a good reply, a refusal, or no time left."""
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
        logging.info("%s%s is asked again: %s", self.url, path, error)
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
      failures.append(f"no whole answer within {deadline_s:g} s")
      raise self._unavailable(path, failures, LateError) from error
    except (_BrokenError, _BusyError) as error:
      raise self._unavailable(path, failures, UnavailableError) from error
    raise RuntimeError("Trying again ended without a result or an error.")

  async def _once(
    self, method: str, path: str, content: bytes | None, kind: type[_Reply]
  ) -> _Reply:
    """Sends a request and reads a reply, once."""
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
      # An engine that is unwell is described by a 503, not refused.
      if status < 300 or kind is wire.Health:
        return kind.model_validate_json(reply.content)
      refusal = wire.Refusal.model_validate_json(reply.content)
    except pydantic.ValidationError as error:
      # Only where it is wrong: what is wrong there may be a prompt.
      first = error.errors(include_input=False, include_context=False)[0]
      place = ".".join(str(part) for part in first["loc"]) or "all of it"
      why = f"its answer ({status}) is malformed: {place}: {first['type']}"
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
      fix="Look into its log. It is started by python -m scripts.serve.",
    )


def token_of_environment() -> str | None:
  """Reads the token that servers ask for, if one is set; the admin's first."""
  for variable in (ADMIN_TOKEN_VARIABLE, TOKEN_VARIABLE):
    if token := os.environ.get(variable, "").strip():
      return token
  return None


def _check_url(url: str) -> None:
  try:
    parts = urllib.parse.urlsplit(url)
    usable = parts.scheme in ("http", "https") and parts.hostname
    usable = usable and (parts.port is None or parts.port > 0)
  except ValueError:
    usable = False
  if not usable:
    raise errors.ConfigError(
      "A rollout server has no usable address.",
      where=url,
      why="It must be http or https, with a host.",
      fix="For example http://127.0.0.1:8765.",
    )


def _seconds(text: str) -> float | None:
  """Reads Retry-After, which may also be a date; those are not waited for."""
  try:
    return min(max(float(text), 0.0), _MAX_RETRY_AFTER_S)
  except ValueError:
    return None


def _check_generated(
  reply: wire.GenerateResponse, request: wire.GenerateRequest
) -> None:
  """Refuses completions that are not what was asked for."""
  if reply.request_id != request.request_id:
    raise _BrokenError("it answered another request")
  if request.version not in (None, reply.version):
    raise _BrokenError(
      f"version {reply.version} wrote it, not {request.version}", again=False
    )
  groups = [len(group) for group in reply.completions]
  if groups != [request.n] * len(request.prompts):
    raise _BrokenError(
      f"it holds {len(groups)} prompts with {sorted(set(groups))} completions, "
      f"not {len(request.prompts)} with {request.n}"
    )
  for group in reply.completions:
    for completion in group:
      _check_completion(completion, request.max_tokens)


def _check_completion(completion: wire.CompletionOut, max_tokens: int) -> None:
  num_tokens = len(completion.token_ids)
  if num_tokens > max_tokens or min(completion.token_ids, default=0) < 0:
    raise _BrokenError(f"{num_tokens} tokens of {max_tokens}, or negative ids")
  for logprobs in (completion.logprobs, completion.model_logprobs):
    if logprobs is None:
      continue
    if len(logprobs) != num_tokens:
      raise _BrokenError(f"{len(logprobs)} logprobs of {num_tokens} tokens")
    if not all(math.isfinite(x) and x <= _LOGPROB_SLACK for x in logprobs):
      raise _BrokenError("a logprob is positive or not finite")
