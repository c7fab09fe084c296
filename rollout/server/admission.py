# SPDX-License-Identifier: Apache-2.0
"""Who is let in, and with how much: in front of every route.

Two tokens are told apart, so that whoever may sample need not be able to
replace the weights. Bodies are read here, whole, within a limit of bytes and of
time; what is refused before it was read is followed by a closed connection.
"""

import asyncio
from collections.abc import Awaitable, Callable
import dataclasses
import hmac

import fastapi
from starlette import types as asgi

from rollout import wire

_BODY_S = 60.0  # For all of a body to arrive.
# What changes a server for everyone else who uses it.
_ADMIN_PATHS = (
  "/init_communicator",
  "/update_weights",
  "/reset_prefix_cache",
  "/close_communicator",
)


@dataclasses.dataclass(frozen=True)
class Tokens:
  """What a request must carry as `Authorization: Bearer`.

  `admin` opens every path, `user` those which only sample and look, or every
  path where there is no `admin`. Without any, everyone is let in.
  """

  user: str | None
  admin: str | None

  def admit(self, path: str, given: bytes) -> bool:
    """Tells whether these words open a path, in a time that tells nothing."""
    accepted = [self.admin or self.user]
    if path.rstrip("/") not in _ADMIN_PATHS:
      accepted.append(self.user)
    opens = [
      hmac.compare_digest(given, f"Bearer {token}".encode())
      for token in accepted
      if token is not None
    ]
    return any(opens) or (self.user is None and self.admin is None)


def respond(
  status: int, body: wire.Refusal, retry_after_s: int | None = None
) -> fastapi.Response:
  """Makes the response that tells of a refusal."""
  headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
  return fastapi.Response(
    body.model_dump_json(), status, headers, "application/json"
  )


class Guard:
  """Lets in only who knows the token, and only bodies of a sane size.

  It stands in front of every route, so none can be forgotten.
  """

  def __init__(
    self, app: asgi.ASGIApp, *, tokens: Tokens, max_body_bytes: int
  ) -> None:
    """Stands in front of `app`."""
    self._app, self._tokens = app, tokens
    self._max_body_bytes = max_body_bytes

  async def __call__(
    self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send
  ) -> None:
    """Passes a request on, or refuses it."""
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return
    given = dict(scope["headers"]).get(b"authorization", b"")
    if not self._tokens.admit(scope["path"], given):
      await _turn_away(401, _UNAUTHORIZED)(scope, receive, send)
      return
    try:
      async with asyncio.timeout(_BODY_S):
        body = await self._read(receive)
    except TimeoutError:
      await _turn_away(408, _TOO_SLOW)(scope, receive, send)
      return
    if body is None:
      await _turn_away(413, self._too_large())(scope, receive, send)
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
  what="The token is missing, wrong, or not for this path.",
  why="This server asks for one, and may have another to replace weights.",
  fix="Send the server's ATLAS_ROLLOUT_TOKEN, or its "
  "ATLAS_ROLLOUT_ADMIN_TOKEN if it has one, as Authorization: Bearer.",
)
_TOO_SLOW = wire.Refusal(
  error="too_slow",
  what="The body did not arrive in time.",
  why=f"All of it must be there within {_BODY_S:g} s.",
  fix="Send fewer prompts at once, or mend the network.",
)


def _turn_away(status: int, body: wire.Refusal) -> fastapi.Response:
  """Refuses what was not read to its end: the rest must not be, either."""
  response = respond(status, body)
  response.headers["Connection"] = "close"
  if status == 401:
    response.headers["WWW-Authenticate"] = "Bearer"
  return response


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
