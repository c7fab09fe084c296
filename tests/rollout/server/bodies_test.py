# SPDX-License-Identifier: Apache-2.0
"""Tests limits on request bodies, and that they do not block /health."""

import asyncio
import json
import threading

import pytest

from rollout import wire
from rollout.server import bodies, generation, refusal
from tests import scripted_server


def _body(**changes):
  return bytearray(json.dumps(scripted_server.request(**changes)).encode())


@pytest.mark.parametrize(
  ("text", "error"),
  [
    ("{", "invalid"),
    ("", "invalid"),
    ("[]", "invalid"),
    ("null", "invalid"),
    ('{"prompts": [{"text": "\\ud800"}], "max_tokens": 1}', "invalid"),
    ('{"prompts": [{"text": "a"}], "max_tokens": NaN}', "invalid"),
    (
      '{"prompts": [{"text": "a"}], "max_tokens": 1, "temperature": 1e999}',
      "invalid",
    ),
    ('{"prompts": [{"text": "a"}], "max_tokens": 1' + "0" * 5000, "invalid"),
    ("[" * 1000, "invalid"),
    ("," * (wire.MAX_COMMAS + 1), "limit"),
    ("{" * (2**17 + 1), "limit"),
    ("[" * (2**17 + 1), "limit"),
    (":" * (2**17 + 1), "limit"),
  ],
)
def test_invalid_bodies_are_rejected(text, error):
  with pytest.raises(refusal.RefusalError) as caught:
    bodies.parse(bytearray(text.encode()), wire.GenerateRequest)
  assert (caught.value.status, caught.value.body.error) == (422, error)
  assert len(caught.value.body.why) < 1000


def test_a_list_of_errors_stops_at_the_first():
  body = _body(prompts=[{"token_ids": ["a"] * 10_000}])
  with pytest.raises(refusal.RefusalError) as caught:
    bodies.parse(body, wire.GenerateRequest)
  assert caught.value.body.why.count("token_ids") == 1


def test_the_digest_is_that_of_the_bytes():
  one, other = (
    bodies.parse(_body(seed=seed), wire.GenerateRequest) for seed in (1, 2)
  )
  assert one.message.seed == 1
  assert one.digest != other.digest
  assert one == bodies.parse(_body(seed=1), wire.GenerateRequest)


def test_bodies_that_are_too_large_are_not_received():
  async def test():
    async with scripted_server.Server().client() as client:
      kind = {"content-type": "application/json"}
      reply = await client.post("/generate", content=b" " * 5000, headers=kind)
      scripted_server.assert_rejected(reply, 413, "limit")
      assert reply.headers["connection"] == "close"

  scripted_server.run(test)


@pytest.mark.parametrize(
  "kind", ["", "text/plain", "application/x-www-form-urlencoded"]
)
def test_a_website_cannot_send_requests_from_a_browser(kind):
  """It may send these types to other hosts, but not application/json."""

  async def test():
    served = scripted_server.Server()
    async with served.client() as client:
      reply = await client.post(
        "/generate", content=bytes(_body()), headers={"content-type": kind}
      )
      scripted_server.assert_rejected(reply, 415, "content_type")
    assert served.engine.num_calls == 0

  scripted_server.run(test)


def test_chunked_bodies_are_not_received():
  async def test():
    call = _Call(
      scripted_server.Server().app, header=(b"transfer-encoding", b"chunked")
    )
    assert await call.error() == (411, "chunked")
    assert (b"connection", b"close") in call.sent[0]["headers"]

  scripted_server.run(test)


class _Call:
  """A POST whose body a test sends in pieces."""

  def __init__(
    self, app, path="/generate", header=(b"content-length", b"4000")
  ):
    self._messages, self.sent = asyncio.Queue(), []
    scope = {
      "type": "http",
      "method": "POST",
      "path": path,
      "query_string": b"",
      "headers": [
        header,
        (b"content-type", b"application/json; charset=utf-8"),
      ],
    }
    self.task = asyncio.create_task(
      app(scope, self._messages.get, self._collect)
    )

  async def _collect(self, message):
    self.sent.append(message)

  def send(self, body, more=True):
    self._messages.put_nowait(
      {"type": "http.request", "body": body, "more_body": more}
    )

  def leave(self):
    self._messages.put_nowait({"type": "http.disconnect"})

  async def error(self):
    await self.task
    return self.sent[0]["status"], json.loads(self.sent[1]["body"])["error"]


def test_a_slow_body_times_out(monkeypatch):
  monkeypatch.setattr(bodies, "_BODY_S", 0.05)

  async def test():
    call = _Call(scripted_server.Server().app)
    call.send(b"{")
    assert await call.error() == (408, "too_slow")

  scripted_server.run(test)


def test_all_unfinished_bodies_together_are_limited():
  async def test():
    served = scripted_server.Server(max_total_body_bytes=8192)
    calls = [_Call(served.app) for _ in range(3)]
    for call in calls:
      call.send(b" " * 3000)  # 9000 of at most 8192.
      await asyncio.sleep(0)
    assert await calls[2].error() == (503, "bodies")
    for call in calls[:2]:
      call.leave()
      await call.task
    # All of it is free again.
    late = _Call(served.app)
    late.send(bytes(_body()), more=False)
    await late.task
    assert late.sent[0]["status"] == 200

  scripted_server.run(test)


@pytest.mark.parametrize("path", ["/generate", "/update_weights"])
def test_a_cut_body_is_not_executed(path, tmp_path):
  async def test():
    served = scripted_server.Server()
    async with served.client() as client:
      await client.post(
        "/init_communicator", json=scripted_server.init(tmp_path)
      )
    body = scripted_server.request()
    if path == "/update_weights":
      body = scripted_server.push(tmp_path, 1)
    call = _Call(served.app, path)
    # Valid by itself; the client announced more.
    call.send(json.dumps(body).encode())
    call.leave()
    await call.task
    assert served.engine.num_calls == 0
    assert served.weights.held.version == 0

  scripted_server.run(test)


def test_health_is_answered_while_a_body_is_parsed(monkeypatch):
  started, resume = threading.Event(), threading.Event()
  threads = []

  def slow_parse(body, kind):
    threads.append(threading.current_thread())
    started.set()
    resume.wait(10.0)
    return parse(body, kind)

  parse = bodies.parse
  monkeypatch.setattr(bodies, "parse", slow_parse)

  async def test():
    served = scripted_server.Server()
    async with served.client() as client:
      task = asyncio.create_task(
        client.post("/generate", json=scripted_server.request())
      )
      await scripted_server.until(started.is_set)
      assert (await client.get("/health")).status_code == 200
      assert not task.done()
      resume.set()
      assert (await task).status_code == 200
    assert threading.main_thread() not in threads

  scripted_server.run(test)


def test_health_is_answered_while_a_prompt_is_tokenized(monkeypatch):
  started, resume = threading.Event(), threading.Event()
  to_prompts = generation.to_prompts

  def slow(*args):
    started.set()
    resume.wait(10.0)
    return to_prompts(*args)

  monkeypatch.setattr(generation, "to_prompts", slow)

  async def test():
    served = scripted_server.Server()
    async with served.client() as client:
      body = scripted_server.request(prompts=[{"text": "two words"}])
      task = asyncio.create_task(client.post("/generate", json=body))
      await scripted_server.until(started.is_set)
      health = wire.Health.model_validate((await client.get("/health")).json())
      assert (health.num_waiting, health.num_running) == (1, 0)
      resume.set()
      assert (await task).status_code == 200
    # Tokenizing and decoding.
    assert served.engine.threads == {"requests_0"}

  scripted_server.run(test)
