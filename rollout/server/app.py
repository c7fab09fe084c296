# SPDX-License-Identifier: Apache-2.0
"""The rollout server's HTTP face: its routes, and how each of them refuses.

Every path exists with and without a trailing slash. Every refusal is a
`wire.Refusal`, and none repeats what was sent: prompts stay out of logs.
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

_WATCH_S = 0.5  # A trainer's silence is noticed this late at most.

_REFUSALS: dict[int | str, dict[str, Any]] = {  # Any: as FastAPI wants it.
  status: {"model": wire.Refusal} for status in (401, 409, 413, 422, 429, 503)
}


def create_app(
  backend: service.Service, *, tokens: admission.Tokens
) -> fastapi.FastAPI:
  """Makes the app.

  Args:
    backend: does the work.
    tokens: what requests must carry.
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
    admission.Guard, tokens=tokens, max_body_bytes=backend.limits.max_body_bytes
  )
  return app


async def _watch(weights: weight_channel.Channel) -> None:
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
    request: fastapi.Request, error: weight_channel.RefusalError
  ) -> fastapi.Response:
    backend.count("refused_requests_total")
    logging.info(
      "%s refused (%d): %s", request.url.path, error.status, error.body.what
    )
    return admission.respond(error.status, error.body, error.retry_after_s)

  handlers: dict[Any, Any] = {  # Any: each takes its own class of error.
    weight_channel.RefusalError: refused,
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
  """Tells of pushed weights that cannot be used, or of an unwell engine."""
  logging.warning("%s failed: %s", request.url.path, error)
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
  """Tells where a request is wrong."""
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
  return admission.respond(422, body)


async def _unanswerable(
  request: fastapi.Request, error: starlette_exceptions.HTTPException
) -> fastapi.Response:
  """Tells that there is no such path or method."""
  body = wire.Refusal(
    error="http",
    what=f"{request.method} {request.url.path} cannot be answered.",
    why=str(error.detail),
    fix="GET /docs lists what can be asked.",
  )
  return admission.respond(error.status_code, body)


async def _unknown(
  request: fastapi.Request, error: Exception
) -> fastapi.Response:
  """Tells no more of a fault of ours than its kind."""
  del request
  body = wire.Refusal(
    error="internal",
    what="The server failed.",
    why=type(error).__name__,
    fix="Look into its log; restart it if /health is not ok.",
  )
  return admission.respond(500, body)
