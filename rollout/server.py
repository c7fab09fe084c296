# SPDX-License-Identifier: Apache-2.0
"""The rollout server's HTTP face: routes, limits, authentication, refusals.

Every path exists with and without a trailing slash. Every refusal is a
`wire.Refusal`, and none repeats what was sent: prompts stay out of logs.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
import contextlib
import hmac
from typing import Any

from absl import logging
import fastapi
from fastapi import exceptions
from starlette import exceptions as starlette_exceptions
from starlette import types as asgi

from atlas_jax import errors
from rollout import channel, service, wire

_BODY_S = 60.0  # For all of a body to arrive.
_WATCH_S = 0.5  # A trainer's silence is noticed this late at most.

_REFUSALS: dict[int | str, dict[str, Any]] = {  # Any: as FastAPI wants it.
  status: {"model": wire.Refusal} for status in (401, 409, 413, 422, 429, 503)
}


def create_app(
  backend: service.Service, *, token: str | None
) -> fastapi.FastAPI:
  """Makes the app.

  Args:
    backend: does the work.
    token: what every request must carry as `Authorization: Bearer`, or None on
      a loopback address.
  """

  @contextlib.asynccontextmanager
  async def lifespan(app: fastapi.FastAPI) -> AsyncIterator[None]:
    del app
    watch = asyncio.create_task(_watch(backend.weights))
    yield
    watch.cancel()

  app = fastapi.FastAPI(
    title="atlas_jax rollout server",
    description="Samples completions from a model whose weights a trainer may "
    "replace. With a token set, send `Authorization: Bearer TOKEN`.",
    lifespan=lifespan,
    redirect_slashes=False,
    responses=_REFUSALS,
  )
  _add_routes(app, backend)
  _add_handlers(app, backend)
  app.add_middleware(
    _Guard, token=token, max_body_bytes=backend.limits.max_body_bytes
  )
  return app


async def _watch(weights: channel.Channel) -> None:
  """Asks often who holds the channel: asking is what notices a lost one."""
  while True:
    _ = weights.trainer_id
    await asyncio.sleep(_WATCH_S)


class _Endpoints:
  """What is done under each path; the docstrings are shown at /docs."""

  def __init__(self, backend: service.Service) -> None:
    self._backend = backend

  async def health(self, response: fastapi.Response) -> wire.Health:
    """Tells how the engine is; 503 unless it is well."""
    state = self._backend.health()
    response.status_code = 200 if state.status == "ok" else 503
    return state

  async def generate(self, request: wire.GenerateRequest) -> fastapi.Response:
    """Samples `n` completions of each prompt."""
    self._backend.count("requests_total")
    # Already JSON: it is written once, also for a repeated request.
    return fastapi.Response(
      await self._backend.generate(request), media_type="application/json"
    )

  async def init_communicator(self, request: wire.InitRequest) -> wire.Version:
    """Opens the weight channel; again, it is a heartbeat."""
    self._backend.weights.init(request)
    return self._backend.weights.held

  async def update_weights(
    self, request: wire.UpdateRequest
  ) -> wire.UpdateResponse:
    """Loads a version that was pushed to the channel's directory."""
    return await self._backend.update(request)

  async def reset_prefix_cache(self) -> wire.Done:
    """Forgets what was cached of earlier prompts."""
    await self._backend.engine.reset_prefix_cache()
    return wire.Done(message="The prefix cache is empty.")

  async def close_communicator(self, request: wire.CloseRequest) -> wire.Done:
    """Closes the weight channel; the weights stay."""
    was_open = self._backend.weights.close(request)
    return wire.Done(message="Closed." if was_open else "None was open.")

  async def get_tensor_parallel_size(self) -> wire.TensorParallelSize:
    """Gives over how many devices one copy of the weights is spread."""
    size = self._backend.engine.facts.tensor_parallel_size
    return wire.TensorParallelSize(tensor_parallel_size=size)

  async def version(self) -> wire.Version:
    """Tells which weights are held."""
    return self._backend.weights.held

  async def metrics(self) -> fastapi.Response:
    """Gives counts and times in Prometheus' text format."""
    text = "".join(
      f"# TYPE atlas_rollout_{name} "
      f"{'counter' if name.endswith('_total') else 'gauge'}\n"
      f"atlas_rollout_{name} {float(value)}\n"
      for name, value in self._backend.metrics().items()
    )
    return fastapi.Response(text, media_type="text/plain; version=0.0.4")


def _add_routes(app: fastapi.FastAPI, backend: service.Service) -> None:
  """Adds every endpoint, under its name and with a slash behind it."""
  endpoints = _Endpoints(backend)
  for method, endpoint, model in (
    ("GET", endpoints.health, wire.Health),
    ("POST", endpoints.generate, wire.GenerateResponse),
    ("POST", endpoints.init_communicator, wire.Version),
    ("POST", endpoints.update_weights, wire.UpdateResponse),
    ("POST", endpoints.reset_prefix_cache, wire.Done),
    ("POST", endpoints.close_communicator, wire.Done),
    ("GET", endpoints.get_tensor_parallel_size, wire.TensorParallelSize),
    ("GET", endpoints.version, wire.Version),
    ("GET", endpoints.metrics, None),
  ):
    for slash in ("", "/"):
      app.add_api_route(
        f"/{endpoint.__name__}{slash}",
        endpoint,
        methods=[method],
        response_model=model,
        include_in_schema=not slash,
      )


def _add_handlers(app: fastapi.FastAPI, backend: service.Service) -> None:
  """Turns every way to fail into a refusal."""

  async def refused(
    request: fastapi.Request, error: channel.RefusalError
  ) -> fastapi.Response:
    backend.count("refused_requests_total")
    logging.info(
      "%s refused (%d): %s", request.url.path, error.status, error.body.what
    )
    return _respond(error.status, error.body, error.retry_after_s)

  async def known(
    request: fastapi.Request, error: errors.AtlasError
  ) -> fastapi.Response:
    logging.warning("%s failed: %s", request.url.path, error)
    status, name = (
      (409, "weights")
      if isinstance(error, errors.CheckpointError)
      else (503, "engine")
    )
    what = f"{error.what} ({error.where})"
    body = wire.Refusal(error=name, what=what, why=error.why, fix=error.fix)
    return _respond(status, body)

  async def invalid(
    request: fastapi.Request, error: exceptions.RequestValidationError
  ) -> fastapi.Response:
    del request
    # Of each error only its place and kind: the input may hold a prompt.
    wrong = [
      f"{'.'.join(map(str, item['loc']))}: {item['msg']}"
      for item in error.errors()[:8]
    ]
    body = wire.Refusal(
      error="invalid",
      what="The request is not of the expected form.",
      why="; ".join(wrong),
      fix="GET /docs shows every field.",
    )
    return _respond(422, body)

  async def http(
    request: fastapi.Request, error: starlette_exceptions.HTTPException
  ) -> fastapi.Response:
    body = wire.Refusal(
      error="http",
      what=f"{request.method} {request.url.path} cannot be answered.",
      why=str(error.detail),
      fix="GET /docs lists what can be asked.",
    )
    return _respond(error.status_code, body)

  async def unknown(
    request: fastapi.Request, error: Exception
  ) -> fastapi.Response:
    del request
    body = wire.Refusal(
      error="internal",
      what="The server failed.",
      why=type(error).__name__,
      fix="Look into its log; restart it if /health is not ok.",
    )
    return _respond(500, body)

  handlers: dict[Any, Any] = {  # Any: each takes its own class of error.
    channel.RefusalError: refused,
    errors.AtlasError: known,
    exceptions.RequestValidationError: invalid,
    starlette_exceptions.HTTPException: http,
    Exception: unknown,
  }
  for kind, handler in handlers.items():
    app.add_exception_handler(kind, handler)


def _respond(
  status: int, body: wire.Refusal, retry_after_s: int | None = None
) -> fastapi.Response:
  headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
  return fastapi.Response(
    body.model_dump_json(), status, headers, "application/json"
  )


class _Guard:
  """Lets in only who knows the token, and only bodies of a sane size.

  It stands in front of every route, so none can be forgotten.
  """

  def __init__(
    self, app: asgi.ASGIApp, *, token: str | None, max_body_bytes: int
  ) -> None:
    self._app, self._max_body_bytes = app, max_body_bytes
    self._expected = None if token is None else f"Bearer {token}".encode()

  async def __call__(
    self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send
  ) -> None:
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return
    headers = dict(scope["headers"])
    given = headers.get(b"authorization", b"")
    if self._expected and not hmac.compare_digest(given, self._expected):
      response = _respond(401, _UNAUTHORIZED)
      response.headers["WWW-Authenticate"] = "Bearer"
      await response(scope, receive, send)
      return
    try:
      async with asyncio.timeout(_BODY_S):
        body = await self._read(receive)
    except TimeoutError:
      await _respond(408, _TOO_SLOW)(scope, receive, send)
      return
    if body is None:
      await _respond(413, self._too_large())(scope, receive, send)
      return
    await self._app(scope, _replay(body, receive), send)

  async def _read(self, receive: asgi.Receive) -> bytes | None:
    """Reads a whole body, or None once it is too large."""
    body, more = bytearray(), True
    while more:
      message = await receive()
      body += message.get("body", b"")
      more = message.get("more_body", False)
      if len(body) > self._max_body_bytes:
        return None
    return bytes(body)

  def _too_large(self) -> wire.Refusal:
    return wire.Refusal(
      error="limit",
      what=f"The body has more than {self._max_body_bytes} bytes.",
      why="--max_body_bytes is the limit.",
      fix="Send fewer prompts at once.",
    )


_UNAUTHORIZED = wire.Refusal(
  error="unauthorized",
  what="The token is missing or wrong.",
  why="This server asks for one.",
  fix="Send the server's ATLAS_ROLLOUT_TOKEN as Authorization: Bearer.",
)
_TOO_SLOW = wire.Refusal(
  error="too_slow",
  what="The body did not arrive in time.",
  why=f"All of it must be there within {_BODY_S:g} s.",
  fix="Send fewer prompts at once, or mend the network.",
)


def _replay(
  body: bytes, receive: asgi.Receive
) -> Callable[[], Awaitable[asgi.Message]]:
  """Gives a body that was read already, then what really comes."""
  sent = False

  async def replayed() -> asgi.Message:
    nonlocal sent
    if sent:
      return await receive()
    sent = True
    return {"type": "http.request", "body": body, "more_body": False}

  return replayed
