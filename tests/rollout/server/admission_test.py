# SPDX-License-Identifier: Apache-2.0
"""Tests authentication: every route has an audience, however it is spelt."""

import asyncio

import fastapi
import pytest

from rollout.server import admission
from tests import scripted_server

_USER, _ADMIN = scripted_server.TOKEN, scripted_server.TOKEN[::-1]
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
# How a proxy or a client may write a path that a router takes for `path`.
_SPELLINGS = (
  "{path}",
  "{path}/",
  "{path}//",
  "/{path}",
  "{path}%0A",
  "{path}%0D%0A",
  "{path}/%0A",
  "{path}%00",
  "{path}%20",
  "{path}?a=b",
  "{path};a",
  "{path}%2F",
  "/.{path}",
  "/health/..{path}",
  "/%2e%2e{path}",
  "{upper}",
  "{encoded}",
)
# What only the admin may do, and what user and admin may do.
_ADMINS = {
  "/init_communicator",
  "/update_weights",
  "/reset_prefix_cache",
  "/close_communicator",
}


def _spelt(path):
  encoded = "/" + "".join(f"%{ord(letter):02x}" for letter in path[1:])
  return [
    form.format(path=path, upper=path.upper(), encoded=encoded)
    for form in _SPELLINGS
  ]


class _Transport:
  """Calls an app as uvicorn does, which does not normalize paths."""

  def __init__(self, app):
    self._app = app

  async def status(self, method, path, token):
    raw, _, query = path.partition("?")
    parts = raw.split("%")
    decoded = bytes(parts[0], "ascii") + b"".join(
      bytes([int(part[:2], 16)]) + bytes(part[2:], "ascii")
      for part in parts[1:]
    )
    headers = [(b"content-length", b"0")]
    if token:
      headers.append((b"authorization", f"Bearer {token}".encode()))
    scope = {
      "type": "http",
      "method": method,
      "path": decoded.decode(),
      "raw_path": raw.encode(),
      "query_string": query.encode(),
      "root_path": "",
      "headers": headers,
    }
    sent = []

    async def receive():
      return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
      sent.append(message)

    await self._app(scope, receive, send)
    return sent[0]["status"]


def test_no_spelling_of_a_path_changes_who_may_call_it():
  async def test():
    served = scripted_server.Server(token=_USER, admin_token=_ADMIN)
    calls = _Transport(served.app)
    paths = {route.path for route in served.app.routes}
    assert paths > _ADMINS
    reached = dict.fromkeys((None, "wrong", _USER, _ADMIN), 0)
    for path in sorted(paths):
      for spelling in _spelt(path):
        for method in _METHODS:
          for token in reached:
            status = await calls.status(method, spelling, token)
            case = (method, spelling, token, status)
            if token in (None, "wrong"):
              assert status in (401, 404, 405), case
            elif token == _USER and path.rstrip("/") in _ADMINS:
              assert status in (403, 404, 405), case
            else:
              assert status not in (401, 403), case
            # An empty body is invalid, but the handler was reached.
            reached[token] += status in (200, 422)
    assert reached[None] == reached["wrong"] == 0
    # A trailing newline reaches the route itself, with its dependency.
    assert await calls.status("POST", "/reset_prefix_cache%0A", _USER) == 403
    assert await calls.status("POST", "/reset_prefix_cache%0A", _ADMIN) == 200
    assert 0 < reached[_USER] < reached[_ADMIN]

  scripted_server.run(test)


def test_only_reading_and_sampling_are_for_users():
  routes = scripted_server.Server().app.routes
  assert {r.path.rstrip("/") for r in routes if _audience(r) == "admin"} == (
    _ADMINS
  )
  users = [r for r in routes if _audience(r) == "user"]
  assert all(r.methods == {"GET"} or "generate" in r.path for r in users)


def _audience(route):
  (require,) = (d.call for d in route.dependant.dependencies)
  return require.audience


@pytest.mark.parametrize("kind", ["api", "plain", "websocket", "mount"])
def test_a_route_without_an_audience_fails(kind):
  app = fastapi.FastAPI(openapi_url=None)
  admission.check_declared(app.routes)

  async def open_to_all():
    return None

  if kind == "api":
    app.add_api_route("/new", open_to_all)
  elif kind == "plain":
    app.add_route("/new", open_to_all)
  elif kind == "websocket":
    app.add_api_websocket_route("/new", open_to_all)
  else:
    app.mount("/new", fastapi.FastAPI())
  with pytest.raises(RuntimeError, match="declares no audience"):
    admission.check_declared(app.routes)


@pytest.mark.parametrize(
  ("user", "admin", "sent", "found"),
  [
    (None, None, "", "admin"),
    (_USER, None, f"Bearer {_USER}", "admin"),
    (_USER, _ADMIN, f"Bearer {_USER}", "user"),
    (_USER, _ADMIN, f"Bearer {_ADMIN}", "admin"),
    (_USER, _ADMIN, f"bearer {_ADMIN}", None),
    (_USER, _ADMIN, _ADMIN, None),
    (_USER, _ADMIN, "Bearer None", None),
    (_USER, None, "Bearer None", None),
    (_USER, None, "", None),
  ],
)
def test_tokens_identify_their_owner(user, admin, sent, found):
  tokens = admission.Tokens(user=user, admin=admin)
  assert tokens.identify(sent.encode()) == found


def test_a_rejected_body_closes_the_connection():
  async def test():
    served = scripted_server.Server(token=_USER)
    async with served.client() as client:
      reply = await client.post("/generate", content=b" " * 100)
      scripted_server.assert_rejected(reply, 401, "unauthorized")
      assert reply.headers["connection"] == "close"
      assert reply.headers["www-authenticate"] == "Bearer"
      # Nothing is left to send.
      assert "connection" not in (await client.get("/health")).headers

  scripted_server.run(test)


def test_a_user_cannot_replace_weights(tmp_path):
  async def test():
    served = scripted_server.Server(token=_USER, admin_token=_ADMIN)
    body = scripted_server.init(tmp_path)
    async with served.client(headers={"authorization": f"Bearer {_USER}"}) as c:
      await asyncio.gather(
        *(c.post(f"/init_communicator{x}", json=body) for x in ("", "/", "%0A"))
      )
      assert served.weights.trainer_id is None
      reply = await c.post("/init_communicator", json=body)
      scripted_server.assert_rejected(reply, 403, "forbidden")
      reply = await c.post("/generate", json=scripted_server.request())
      assert reply.status_code == 200

  scripted_server.run(test)
