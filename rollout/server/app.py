# SPDX-License-Identifier: Apache-2.0
"""The rollout server's HTTP routes and error responses.

Every path exists with and without a trailing slash. Every error response is a
`wire.Refusal`. None repeats the request, so prompts stay out of logs.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
import contextlib
import dataclasses
from typing import Any

from absl import logging
import fastapi
from fastapi import responses
import pydantic
from starlette import exceptions as starlette_exceptions
from starlette import requests

from atlas_jax import errors
from rollout import wire
from rollout.server import (
  admission,
  api_page,
  bodies,
  refusal,
  service,
  weight_channel,
)

_WATCH_S = 0.5  # Maximum delay until a lost trainer is noticed.

_REFUSALS: dict[int | str, dict[str, Any]] = {  # Any: FastAPI's type.
  status: {"model": wire.Refusal}
  for status in (401, 403, 408, 409, 411, 413, 415, 422, 429, 503)
}


def create_app(
  backend: service.Service, *, tokens: admission.Tokens
) -> fastapi.FastAPI:
  """Creates the app.

  Args:
    backend: handles the requests.
    tokens: accepted for authentication.

  Raises:
    RuntimeError: if a route declares no audience.
  """

  @contextlib.asynccontextmanager
  async def lifespan(app: fastapi.FastAPI) -> AsyncIterator[None]:
    del app
    watch = asyncio.create_task(_watch(backend.weights))
    yield
    watch.cancel()

  app = fastapi.FastAPI(
    title="atlas_jax rollout server",
    description="Samples completions from a model whose weights a trainer can "
    "replace. If a token is set, send `Authorization: Bearer TOKEN`.",
    lifespan=lifespan,
    redirect_slashes=False,
    responses=_REFUSALS,
    # Both are routes of ours: FastAPI's have no audience, and its pages load
    # scripts from a CDN.
    openapi_url=None,
    docs_url=None,
    redoc_url=None,
  )
  _add_routes(app, backend, tokens)
  _add_handlers(app, backend)
  admission.check_declared(app.routes)
  app.add_middleware(admission.CloseUnread)
  return app


async def _watch(weights: weight_channel.Channel) -> None:
  """Polls `trainer_id`, which closes the channel of a lost trainer."""
  while True:
    _ = weights.trainer_id
    await asyncio.sleep(_WATCH_S)


class _Endpoints:
  """The endpoint handlers; their docstrings are shown at /docs."""

  def __init__(self, backend: service.Service) -> None:
    self._backend = backend

  async def health(self, response: fastapi.Response) -> wire.Health:
    """Returns the engine's status; 503 unless it is ok."""
    state = self._backend.health()
    response.status_code = 200 if state.status == "ok" else 503
    return state

  async def generate(
    self, body: bodies.Body[wire.GenerateRequest]
  ) -> fastapi.Response:
    """Samples `n` completions of each prompt."""
    self._backend.count("requests_total")
    # Already JSON: a repeated request is not serialized again.
    return fastapi.Response(
      await self._backend.generate(body.message, body.digest),
      media_type="application/json",
    )

  async def init_communicator(
    self, body: bodies.Body[wire.InitRequest]
  ) -> wire.Version:
    """Opens the weight channel; a repeated call is a heartbeat."""
    self._backend.weights.init(body.message)
    return self._backend.weights.held

  async def update_weights(
    self, body: bodies.Body[wire.UpdateRequest]
  ) -> wire.UpdateResponse:
    """Loads a version from the channel's directory."""
    return await self._backend.update(body.message)

  async def reset_prefix_cache(self) -> wire.Done:
    """Clears cached keys and values of earlier prompts."""
    await self._backend.reset_prefix_cache()
    return wire.Done(message="The prefix cache is empty.")

  async def close_communicator(
    self, body: bodies.Body[wire.CloseRequest]
  ) -> wire.Done:
    """Closes the weight channel; the weights stay."""
    was_open = self._backend.weights.close(body.message)
    return wire.Done(message="Closed." if was_open else "It was not open.")

  async def get_tensor_parallel_size(self) -> wire.TensorParallelSize:
    """Returns the number of devices that share one copy of the weights."""
    size = self._backend.engine.facts.tensor_parallel_size
    return wire.TensorParallelSize(tensor_parallel_size=size)

  async def version(self) -> wire.Version:
    """Returns the version that is loaded."""
    return self._backend.weights.held

  async def metrics(self) -> fastapi.Response:
    """Returns counts and times in the Prometheus text format."""
    text = "".join(
      f"# TYPE atlas_rollout_{name} "
      f"{'counter' if name.endswith('_total') else 'gauge'}\n"
      f"atlas_rollout_{name} {float(value)}\n"
      for name, value in self._backend.metrics().items()
    )
    return _Metrics(text)


class _Metrics(responses.PlainTextResponse):
  """The Prometheus text format."""

  media_type = "text/plain; version=0.0.4"


@dataclasses.dataclass(frozen=True)
class _Route:
  """An endpoint, who may call it, and the types of its bodies, if any."""

  method: str
  endpoint: Callable[..., Awaitable[Any]]  # Any: each returns another type.
  audience: admission.Audience
  request: type[pydantic.BaseModel] | None
  response: type[pydantic.BaseModel] | None


def _routes(backend: service.Service) -> list[_Route]:
  """Returns all routes but those of the documentation."""
  own = _Endpoints(backend)
  return [
    _Route("GET", own.health, "user", None, wire.Health),
    _Route(
      "POST", own.generate, "user", wire.GenerateRequest, wire.GenerateResponse
    ),
    _Route(
      "POST", own.init_communicator, "admin", wire.InitRequest, wire.Version
    ),
    _Route(
      "POST",
      own.update_weights,
      "admin",
      wire.UpdateRequest,
      wire.UpdateResponse,
    ),
    _Route("POST", own.reset_prefix_cache, "admin", None, wire.Done),
    _Route(
      "POST", own.close_communicator, "admin", wire.CloseRequest, wire.Done
    ),
    _Route(
      "GET",
      own.get_tensor_parallel_size,
      "user",
      None,
      wire.TensorParallelSize,
    ),
    _Route("GET", own.version, "user", None, wire.Version),
    _Route("GET", own.metrics, "user", None, None),
  ]


def _add_routes(
  app: fastapi.FastAPI, backend: service.Service, tokens: admission.Tokens
) -> None:
  """Adds every endpoint under its name, with and without a slash."""
  limits = backend.limits
  received = bodies.Bodies(
    max_bytes=limits.max_body_bytes,
    max_total_bytes=limits.max_total_body_bytes,
  )
  routes = _routes(backend)
  for route in routes:
    name = route.endpoint.__name__
    endpoint, extra = route.endpoint, None
    if route.request is not None:
      endpoint = _with_body(route.endpoint, received, route.request)
      extra = {"requestBody": api_page.request_body(route.request)}
    for slash in ("", "/"):
      app.add_api_route(
        f"/{name}{slash}",
        endpoint,
        methods=[route.method],
        response_model=route.response,
        response_class=responses.JSONResponse if route.response else _Metrics,
        name=name,
        description=route.endpoint.__doc__,
        dependencies=[
          fastapi.Depends(admission.Require(route.audience, tokens))
        ],
        openapi_extra=extra,
        include_in_schema=not slash,
      )
  page = api_page.Page(app, [r.request for r in routes if r.request])
  for path, show in (("/openapi.json", page.openapi), ("/docs", page.html)):
    app.add_api_route(
      path,
      show,
      dependencies=[fastapi.Depends(admission.Require("user", tokens))],
      include_in_schema=False,
    )


def _with_body(
  endpoint: Callable[..., Awaitable[Any]],  # Any: see `_Route`.
  received: bodies.Bodies,
  kind: type[pydantic.BaseModel],
) -> Callable[[fastapi.Request], Awaitable[Any]]:
  """Returns a handler that passes the parsed body to an endpoint.

  FastAPI would parse it in the event loop, before it runs the dependencies that
  check the token.
  """

  async def handle(request: fastapi.Request) -> Any:  # Any: see `_Route`.
    return await endpoint(await received.receive(request, kind))

  return handle


def _add_handlers(app: fastapi.FastAPI, backend: service.Service) -> None:
  """Adds handlers that turn every exception into a `wire.Refusal`."""

  async def rejected(
    request: fastapi.Request, error: refusal.RefusalError
  ) -> fastapi.Response:
    backend.count("refused_requests_total")
    logging.info(
      "Rejected %s (%d): %s", request.url.path, error.status, error.body.what
    )
    return refusal.respond(error.status, error.body, error.retry_after_s)

  handlers: dict[Any, Any] = {  # Any: each takes a different exception class.
    refusal.RefusalError: rejected,
    errors.AtlasError: _failed,
    requests.ClientDisconnect: _left,
    starlette_exceptions.HTTPException: _unanswerable,
    Exception: _unknown,
  }
  for kind, handler in handlers.items():
    app.add_exception_handler(kind, handler)


async def _failed(
  request: fastapi.Request, error: errors.AtlasError
) -> fastapi.Response:
  """Reports invalid pushed weights (409) or an engine failure (503)."""
  logging.warning("Failed %s: %s", request.url.path, error)
  status, name = (
    (409, "weights")
    if isinstance(error, errors.CheckpointError)
    else (503, "engine")
  )
  what = f"{error.what} ({error.where})"
  body = wire.Refusal(error=name, what=what, why=error.why, fix=error.fix)
  return refusal.respond(status, body)


async def _left(
  request: fastapi.Request, error: requests.ClientDisconnect
) -> fastapi.Response:
  """Ends a request whose client disconnected before its body was complete."""
  del request, error
  return fastapi.Response(status_code=400)  # Nobody receives it.


async def _unanswerable(
  request: fastapi.Request, error: starlette_exceptions.HTTPException
) -> fastapi.Response:
  """Reports an unknown path or method."""
  body = wire.Refusal(
    error="http",
    what=f"Unsupported request: {request.method} {request.url.path}.",
    why=str(error.detail),
    fix="See GET /docs for the endpoints.",
  )
  return refusal.respond(error.status_code, body)


async def _unknown(
  request: fastapi.Request, error: Exception
) -> fastapi.Response:
  """Reports an internal error by its type only."""
  del request
  body = wire.Refusal(
    error="internal",
    what="Internal server error.",
    why=type(error).__name__,
    fix="See the server's log; restart it if /health is not ok.",
  )
  return refusal.respond(500, body)
