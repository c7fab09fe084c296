# SPDX-License-Identifier: Apache-2.0
"""Who may call a route, by the token of the request.

Every route declares its audience as a dependency, so how a path is spelt does
not matter: whatever leads to a route passes its check.
"""

from collections.abc import Iterable
import dataclasses
import hmac
from typing import Literal

import fastapi
from fastapi import routing
from starlette import routing as starlette_routing
from starlette import types as asgi

from rollout.server import refusal

Audience = Literal["user", "admin"]


@dataclasses.dataclass(frozen=True)
class Tokens:
  """The accepted values of `Authorization: Bearer`.

  `admin` grants access to every route, `user` to sampling and read-only routes;
  if `admin` is None, `user` grants access to every route. If both are None, no
  token is required.
  """

  user: str | None
  admin: str | None

  def identify(self, header: bytes) -> Audience | None:
    """Returns whom a header identifies, in constant time; None if nobody."""
    if self.user is None and self.admin is None:
      return "admin"
    is_user, is_admin = (
      token is not None
      and hmac.compare_digest(header, f"Bearer {token}".encode())
      for token in (self.user, self.admin)
    )
    if is_admin or (is_user and self.admin is None):
      return "admin"
    return "user" if is_user else None


@dataclasses.dataclass(frozen=True)
class Require:
  """The dependency of a route that admits its audience only."""

  audience: Audience
  tokens: Tokens

  async def __call__(self, request: fastapi.Request) -> None:
    """Rejects a request without a sufficient token.

    Raises:
      refusal.RefusalError: 401 without a valid token, 403 if it is valid but
        belongs to a user and the route is for the admin.
    """
    headers = dict(request.scope["headers"])
    found = self.tokens.identify(headers.get(b"authorization", b""))
    if found is None:
      raise refusal.RefusalError(
        401,
        "unauthorized",
        what="The token is missing or invalid.",
        why="This server requires a token.",
        fix="Send the server's ATLAS_ROLLOUT_TOKEN, or its "
        "ATLAS_ROLLOUT_ADMIN_TOKEN if it has one, as Authorization: Bearer.",
      )
    if found != self.audience == "admin":
      raise refusal.RefusalError(
        403,
        "forbidden",
        what="This token is not valid for this endpoint.",
        why="Replacing weights requires the admin token.",
        fix="Send the server's ATLAS_ROLLOUT_ADMIN_TOKEN.",
      )


def check_declared(routes: Iterable[starlette_routing.BaseRoute]) -> None:
  """Checks that every route declares one audience.

  Raises:
    RuntimeError: if one does not; it would be open to everybody.
  """
  for route in routes:
    declared = (
      [d for d in route.dependant.dependencies if isinstance(d.call, Require)]
      if isinstance(route, routing.APIRoute)
      else []
    )
    if len(declared) != 1:
      raise RuntimeError(f"{route} declares no audience.")


class CloseUnread:
  """ASGI middleware that closes a connection whose body was not read.

  Without it, a rejected client could send the rest of its body.
  """

  def __init__(self, app: asgi.ASGIApp) -> None:
    """Wraps `app`."""
    self._app = app

  async def __call__(
    self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send
  ) -> None:
    """Forwards a request to the app."""
    headers = dict(scope.get("headers", ()))
    is_unread = (
      b"transfer-encoding" in headers
      or headers.get(b"content-length", b"0") != b"0"
    )

    async def received() -> asgi.Message:
      nonlocal is_unread
      message = await receive()
      is_unread = is_unread and message.get("more_body", False)
      return message

    async def sent(message: asgi.Message) -> None:
      if is_unread and message["type"] == "http.response.start":
        closing = (b"connection", b"close")
        message = {**message, "headers": [*message["headers"], closing]}
      await send(message)

    await self._app(scope, received, sent)
