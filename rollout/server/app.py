# SPDX-License-Identifier: Apache-2.0
"""The rollout server's HTTP routes and error responses.

Every path exists with and without a trailing slash. Every error response is a
`wire.Refusal`. None repeats the request, so prompts stay out of logs.
"""

import asyncio
from collections.abc import AsyncIterator
import contextlib
from typing import Any

from absl import logging
import fastapi
from fastapi import exceptions
from starlette import exceptions as starlette_exceptions

from atlas_jax import errors
from rollout import wire
from rollout.server import admission, service, weight_channel

_WATCH_S = 0.5  # Maximum delay until a lost trainer is noticed.

_REFUSALS: dict[int | str, dict[str, Any]] = {  # Any: FastAPI's type.
  status: {"model": wire.Refusal} for status in (401, 409, 413, 422, 429, 503)
}


def create_app(
  backend: service.Service, *, tokens: admission.Tokens
) -> fastapi.FastAPI:
  """Creates the app.

  Args:
    backend: handles the requests.
    tokens: accepted for authentication.
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
  )
  _add_routes(app, backend)
  _add_handlers(app, backend)
  app.add_middleware(
    admission.Guard, tokens=tokens, max_body_bytes=backend.limits.max_body_bytes
  )
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

  async def generate(self, request: wire.GenerateRequest) -> fastapi.Response:
    """Samples `n` completions of each prompt."""
    self._backend.count("requests_total")
    # Already JSON: a repeated request is not serialized again.
    return fastapi.Response(
      await self._backend.generate(request), media_type="application/json"
    )

  async def init_communicator(self, request: wire.InitRequest) -> wire.Version:
    """Opens the weight channel; a repeated call is a heartbeat."""
    self._backend.weights.init(request)
    return self._backend.weights.held

  async def update_weights(
    self, request: wire.UpdateRequest
  ) -> wire.UpdateResponse:
    """Loads a version from the channel's directory."""
    return await self._backend.update(request)

  async def reset_prefix_cache(self) -> wire.Done:
    """Clears cached keys and values of earlier prompts."""
    await self._backend.engine.reset_prefix_cache()
    return wire.Done(message="The prefix cache is empty.")

  async def close_communicator(self, request: wire.CloseRequest) -> wire.Done:
    """Closes the weight channel; the weights stay."""
    was_open = self._backend.weights.close(request)
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
    return fastapi.Response(text, media_type="text/plain; version=0.0.4")


def _add_routes(app: fastapi.FastAPI, backend: service.Service) -> None:
  """Adds every endpoint under its name, with and without a slash."""
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
  """Adds handlers that turn every exception into a `wire.Refusal`."""

  async def rejected(
    request: fastapi.Request, error: weight_channel.RefusalError
  ) -> fastapi.Response:
    backend.count("refused_requests_total")
    logging.info(
      "Rejected %s (%d): %s", request.url.path, error.status, error.body.what
    )
    return admission.respond(error.status, error.body, error.retry_after_s)

  handlers: dict[Any, Any] = {  # Any: each takes a different exception class.
    weight_channel.RefusalError: rejected,
    errors.AtlasError: _failed,
    exceptions.RequestValidationError: _invalid,
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
  return admission.respond(status, body)


async def _invalid(
  request: fastapi.Request, error: exceptions.RequestValidationError
) -> fastapi.Response:
  """Reports which fields of a request are invalid."""
  del request
  # Only location and kind of each error: the input may contain a prompt.
  wrong = [
    f"{'.'.join(map(str, item['loc']))}: {item['msg']}"
    for item in error.errors()[:8]
  ]
  body = wire.Refusal(
    error="invalid",
    what="Invalid request.",
    why="; ".join(wrong),
    fix="See GET /docs for the fields.",
  )
  return admission.respond(422, body)


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
  return admission.respond(error.status_code, body)


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
  return admission.respond(500, body)
