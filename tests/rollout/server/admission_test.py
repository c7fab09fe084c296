# SPDX-License-Identifier: Apache-2.0
"""Tests authentication and body limits."""

import asyncio

import pytest

from rollout.server import admission
from tests import scripted_server


def test_every_route_requires_the_token():
  async def test():
    served = scripted_server.Server(token=scripted_server.TOKEN)
    asked = 0
    async with served.client() as client:
      for route in served.app.routes:
        for method in route.methods:
          for header in (
            None,
            "Bearer wrong",
            scripted_server.TOKEN,
            f"bearer {scripted_server.TOKEN}",
          ):
            headers = {"authorization": header} if header else {}
            reply = await client.request(method, route.path, headers=headers)
            assert reply.status_code == 401, (method, route.path, header)
            asked += 1
      headers = {"authorization": f"Bearer {scripted_server.TOKEN}"}
      for path in ("/health", "/docs", "/openapi.json", "/metrics"):
        reply = await client.get(path, headers=headers)
        assert reply.status_code == 200
    assert asked > 4 * 18

  scripted_server.run(test)


def test_the_user_token_cannot_replace_weights(tmp_path):
  async def test():
    admin = scripted_server.TOKEN[::-1]
    served = scripted_server.Server(
      token=scripted_server.TOKEN, admin_token=admin
    )
    body = scripted_server.init(tmp_path)
    async with served.client() as client:
      for token, statuses in [
        (scripted_server.TOKEN, (200, 200, 401, 401, 401)),
        (admin, (200, 200, 200, 200, 200)),
        ("neither", (401,) * 5),
      ]:
        headers = {"authorization": f"Bearer {token}"}
        replies = [
          await client.get("/health", headers=headers),
          await client.post(
            "/generate", headers=headers, json=scripted_server.request()
          ),
          await client.post("/init_communicator", headers=headers, json=body),
          # Another slash does not bypass the check.
          await client.post("/init_communicator/", headers=headers, json=body),
          await client.post("/reset_prefix_cache", headers=headers),
        ]
        assert tuple(r.status_code for r in replies) == statuses

  scripted_server.run(test)


def test_every_state_changing_route_requires_the_admin_token():
  served = scripted_server.Server()
  posts = {
    route.path.rstrip("/")
    for route in served.app.routes
    if "POST" in route.methods
  }
  assert posts - {"/generate"} == set(admission._ADMIN_PATHS)


@pytest.mark.parametrize("announced", [True, False])
def test_large_bodies_are_rejected_before_they_arrive_completely(announced):
  async def test():
    sent = 0

    async def chunks():
      nonlocal sent
      for _ in range(100):
        sent += 1024
        yield b" " * 1024

    async with scripted_server.Server().client() as client:
      content = b" " * 5000 if announced else chunks()
      reply = await client.post("/generate", content=content)
      scripted_server.assert_rejected(reply, 413, "limit")

  scripted_server.run(test)


def test_a_slow_body_times_out(monkeypatch):
  monkeypatch.setattr(admission, "_BODY_S", 0.05)

  async def test():
    sent = []

    async def receive():
      await asyncio.sleep(20)

    async def send(message):
      sent.append(message)

    # ASGITransport sends whole bodies, so the app is called directly.
    scope = {"type": "http", "headers": [], "method": "POST", "path": "/"}
    await scripted_server.Server().app(scope, receive, send)
    assert sent[0]["status"] == 408

  scripted_server.run(test)
