# SPDX-License-Identifier: Apache-2.0
"""Authentication and body limits in front of every route.

Separate user and admin tokens let a client sample without being able to replace
weights. The whole body is read here, within a limit of bytes and of time; the
connection is closed if a request is rejected before its body was read.
"""

import asyncio
from collections.abc import Awaitable, Callable
import dataclasses
import hmac

import fastapi
from starlette import types as asgi

from rollout import wire

_BODY_S = 60.0  # Limit for a whole body to arrive.
# Endpoints that affect other clients of the server.
_ADMIN_PATHS = (
  "/init_communicator",
  "/update_weights",
  "/reset_prefix_cache",
  "/close_communicator",
)


@dataclasses.dataclass(frozen=True)
class Tokens:
  """The accepted values of `Authorization: Bearer`.

  `admin` grants access to every path, `user` to sampling and read-only paths;
  if `admin` is None, `user` grants access to every path. If both are None, no
  token is required.
  """

  user: str | None
  admin: str | None

  def admit(self, path: str, header: bytes) -> bool:
    """Returns whether the header grants access to a path, in constant time."""
    accepted = [self.admin or self.user]
    if path.rstrip("/") not in _ADMIN_PATHS:
      accepted.append(self.user)
    opens = [
      hmac.compare_digest(header, f"Bearer {token}".encode())
      for token in accepted
      if token is not None
    ]
    return any(opens) or (self.user is None and self.admin is None)


def respond(
  status: int, body: wire.Refusal, retry_after_s: int | None = None
) -> fastapi.Response:
  """Returns the HTTP response for a refusal."""
  headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
  return fastapi.Response(
    body.model_dump_json(), status, headers, "application/json"
  )


class Guard:
  """ASGI middleware that checks the token and the body of every request."""

  def __init__(
    self, app: asgi.ASGIApp, *, tokens: Tokens, max_body_bytes: int
  ) -> None:
    """Wraps `app`."""
    self._app, self._tokens = app, tokens
    self._max_body_bytes = max_body_bytes

  async def __call__(
    self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send
  ) -> None:
    """Forwards a request to the app, or rejects it."""
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return
    header = dict(scope["headers"]).get(b"authorization", b"")
    if not self._tokens.admit(scope["path"], header):
      await _reject(401, _UNAUTHORIZED)(scope, receive, send)
      return
    try:
      async with asyncio.timeout(_BODY_S):
        body = await self._read(receive)
    except TimeoutError:
      await _reject(408, _TOO_SLOW)(scope, receive, send)
      return
    if body is None:
      await _reject(413, self._too_large())(scope, receive, send)
      return
    await self._app(scope, _replay(body, receive), send)

  async def _read(self, receive: asgi.Receive) -> bytes | None:
    """Returns the whole body, or None if it is too large."""
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
      what=f"The request body exceeds {self._max_body_bytes} bytes.",
      why="The limit is --max_body_bytes.",
      fix="Send fewer prompts per request.",
    )


_UNAUTHORIZED = wire.Refusal(
  error="unauthorized",
  what="The token is missing, invalid, or not valid for this path.",
  why="This server requires a token; replacing weights may require another.",
  fix="Send the server's ATLAS_ROLLOUT_TOKEN, or its "
  "ATLAS_ROLLOUT_ADMIN_TOKEN if it has one, as Authorization: Bearer.",
)
_TOO_SLOW = wire.Refusal(
  error="too_slow",
  what="Timed out while receiving the request body.",
  why=f"The whole body must arrive within {_BODY_S:g} s.",
  fix="Send fewer prompts per request, or check the network.",
)


def _reject(status: int, body: wire.Refusal) -> fastapi.Response:
  """Rejects a request with an unread body, so the connection must close."""
  response = respond(status, body)
  response.headers["Connection"] = "close"
  if status == 401:
    response.headers["WWW-Authenticate"] = "Bearer"
  return response


def _replay(
  body: bytes, receive: asgi.Receive
) -> Callable[[], Awaitable[asgi.Message]]:
  """Returns an ASGI receive that yields `body` first, then new messages."""
  sent = False

  async def replayed() -> asgi.Message:
    nonlocal sent
    if sent:
      return await receive()
    sent = True
    return {"type": "http.request", "body": body, "more_body": False}

  return replayed
