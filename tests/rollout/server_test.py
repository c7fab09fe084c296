# SPDX-License-Identifier: Apache-2.0
"""What a server refuses, and what it promises to those it serves.

The engine here does what a test scripts; engine_jax_test and engine_vllm_test
put real ones behind the same app.
"""

import asyncio
import contextlib
import time

import httpx2
import numpy as np
import pytest

from atlas_jax import errors
from conversion import shards
from rollout import channel, engine, manifest, server, service, wire

_SHAPES = {"a.weight": (3, 4), "b.weight": (5,)}
_TOKEN = "0123456789abcdef"


class _ScriptedEngine:
  """An engine that works while `go` is set, and counts what it did."""

  facts = engine.Facts("jax", "model", 32, 10, 1)
  is_alive = True

  def __init__(self):
    self.go = asyncio.Event()
    self.go.set()
    self.last_progress_s = time.monotonic()
    self.num_calls = self.num_resets = 0
    self.loaded, self.load_error, self.logprob = [], None, -0.5

  def tokenize(self, text):
    return [len(word) for word in text.split()]

  async def generate(self, prompts, params):
    self.num_calls += 1
    await self.go.wait()
    self.last_progress_s = time.monotonic()
    one = wire.CompletionOut(
      token_ids=[1, 2],
      logprobs=[self.logprob, -0.25],
      model_logprobs=None,
      finish_reason="stop",
    )
    return [[one] * params.group_size for _ in prompts]

  async def load(self, directory, version):
    if self.load_error:
      raise self.load_error
    self.loaded.append((directory.name, version))

  async def reset_prefix_cache(self):
    self.num_resets += 1

  def metrics(self):
    return {"load": 0.5}

  def close(self):
    pass


class _Server:
  """An app over a scripted engine, and a client inside one event loop."""

  def __init__(self, *, role="policy", token=None, allowed=None, **limits):
    self.engine, self.now = _ScriptedEngine(), 0.0
    self.weights = channel.Channel(
      role=role,
      shapes=_SHAPES,
      tokenizer_digest="tok",
      allowed_root=allowed,
      clock=lambda: self.now,
    )
    self.service = service.Service(
      self.engine,
      self.weights,
      role=role,
      tokenizer_digest="tok",
      limits=service.Limits(
        **{
          "max_body_bytes": 4096,
          "max_prompts": 4,
          "max_n": 3,
          "max_tokens": 16,
          "max_queue": 6,
          "hang_s": 30.0,
          "drain_s": 5.0,
          "load_s": 5.0,
          **limits,
        }
      ),
    )
    self.app = server.create_app(self.service, token=token)

  @contextlib.asynccontextmanager
  async def client(self, **kwargs):
    transport = httpx2.ASGITransport(app=self.app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(
      transport=transport, base_url="http://test", **kwargs
    ) as client:
      yield client


def _run(test):
  async def limited():
    async with asyncio.timeout(30):
      await test()

  asyncio.run(limited())


def _request(request_id="r", *, prompts=None, **changes):
  return {
    "request_id": request_id,
    "prompts": prompts or [{"row_id": "row", "token_ids": [3, 4]}],
    "n": 1,
    "max_tokens": 8,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "seed": 0,
    **changes,
  }


def _init(root, trainer_id="t", **changes):
  tensors = [{"name": n, "shape": list(s)} for n, s in _SHAPES.items()]
  return {
    "trainer_id": trainer_id,
    "process": "",
    "role": "policy",
    "tensors": tensors,
    "tokenizer_digest": "tok",
    "weights_root": str(root),
    "heartbeat_s": 10.0,
    **changes,
  }


def _push(root, version, fill=1.0):
  """Writes a version as a trainer does; gives what it then asks for."""
  directory = manifest.directory_of(root, version)
  directory.mkdir()
  shards.write(
    directory,
    _SHAPES,
    lambda name: np.full(_SHAPES[name], fill, np.float32),
    dtype="float32",
    max_shard_bytes=10**9,
  )
  tensors = {
    name: manifest.Tensor(shape=shape, dtype="F32")
    for name, shape in _SHAPES.items()
  }
  files = {path.name: manifest.describe(path) for path in directory.iterdir()}
  listed = manifest.Manifest(version=version, files=files, tensors=tensors)
  digest = manifest.write(directory, listed)
  return {"trainer_id": "t", "version": version, "digest": digest}


async def _until(condition):
  while not condition():
    await asyncio.sleep(0.001)


def _assert_refused(reply, status, error):
  refusal = wire.Refusal.model_validate(reply.json())
  assert (reply.status_code, refusal.error) == (status, error), refusal


@pytest.mark.parametrize("slash", ["", "/"])
def test_every_endpoint_answers_with_and_without_a_slash(tmp_path, slash):
  async def test():
    served = _Server()
    async with served.client() as client:
      for method, path, body in [
        ("GET", "/health", None),
        ("GET", "/version", None),
        ("GET", "/metrics", None),
        ("GET", "/get_tensor_parallel_size", None),
        ("POST", "/generate", _request()),
        ("POST", "/init_communicator", _init(tmp_path)),
        ("POST", "/update_weights", _push(tmp_path, 1)),
        ("POST", "/reset_prefix_cache", None),
        ("POST", "/close_communicator", {"trainer_id": "t"}),
      ]:
        reply = await client.request(method, path + slash, json=body)
        assert reply.status_code == 200, (path, reply.text)

  _run(test)


def test_answers_follow_prompts_and_name_the_version():
  async def test():
    async with _Server().client() as client:
      prompts = [
        {"row_id": "a", "token_ids": [3]},
        {"row_id": "b", "text": "of words"},
      ]
      reply = await client.post(
        "/generate", json=_request(prompts=prompts, n=3)
      )
      answer = wire.GenerateResponse.model_validate(reply.json())
      assert [len(group) for group in answer.completions] == [3, 3]
      assert (answer.request_id, answer.version) == ("r", 0)

  _run(test)


def test_no_route_answers_without_the_token():
  async def test():
    served = _Server(token=_TOKEN)
    asked = 0
    async with served.client() as client:
      for route in served.app.routes:
        for method in route.methods:
          for header in (None, "Bearer wrong", _TOKEN, f"bearer {_TOKEN}"):
            headers = {"authorization": header} if header else {}
            reply = await client.request(method, route.path, headers=headers)
            assert reply.status_code == 401, (method, route.path, header)
            asked += 1
      headers = {"authorization": f"Bearer {_TOKEN}"}
      for path in ("/health", "/docs", "/openapi.json", "/metrics"):
        reply = await client.get(path, headers=headers)
        assert reply.status_code == 200
    assert asked > 4 * 18

  _run(test)


@pytest.mark.parametrize(
  ("changes", "error"),
  [
    ({"n": 4}, "limit"),
    ({"max_tokens": 17}, "limit"),
    ({"prompts": [{"row_id": "x", "token_ids": [1]}] * 5}, "limit"),
    ({"prompts": [{"row_id": "x", "token_ids": [1]}] * 4, "n": 2}, "limit"),
    ({"request_id": "r" * 300}, "limit"),
    ({"n": 0}, "invalid"),
    ({"top_p": 0.0}, "invalid"),
    ({"temperature": -1.0}, "invalid"),
    ({"regex": "(a+)+"}, "invalid"),
    ({"prompts": [{"row_id": "x"}]}, "prompt"),
    ({"prompts": [{"row_id": "x", "text": ""}]}, "prompt"),
    ({"prompts": [{"row_id": "x", "token_ids": [10]}]}, "prompt"),
    ({"prompts": [{"row_id": "x", "token_ids": [-1]}]}, "prompt"),
    (
      {"prompts": [{"row_id": "x", "token_ids": [1], "text": "one"}]},
      "prompt",
    ),
  ],
)
def test_requests_past_a_limit_are_refused_before_they_run(changes, error):
  async def test():
    served = _Server()
    async with served.client() as client:
      reply = await client.post("/generate", json=_request(**changes))
      _assert_refused(reply, 422, error)
    assert served.engine.num_calls == 0

  _run(test)


def test_prompt_too_long_for_the_model_is_refused_by_its_row():
  async def test():
    served = _Server()
    prompts = [
      {"row_id": "short", "token_ids": [1] * 24},
      {"row_id": "long-one", "token_ids": [1] * 25},
    ]
    async with served.client() as client:
      reply = await client.post("/generate", json=_request(prompts=prompts))
      _assert_refused(reply, 422, "prompt")
      assert "long-one" in reply.text
      reply = await client.post("/generate", json=_request(prompts=prompts[:1]))
      assert reply.status_code == 200
    assert served.engine.num_calls == 1

  _run(test)


def test_refusals_repeat_nothing_of_a_prompt():
  async def test():
    async with _Server().client() as client:
      prompts = [{"row_id": "x", "txt": "a secret"}]
      reply = await client.post("/generate", json=_request(prompts=prompts))
      _assert_refused(reply, 422, "invalid")
      assert "secret" not in reply.text
      assert "prompts.0.txt" in reply.text

  _run(test)


@pytest.mark.parametrize("announced", [True, False])
def test_large_bodies_are_refused_before_all_of_them_arrived(announced):
  async def test():
    sent = 0

    async def chunks():
      nonlocal sent
      for _ in range(100):
        sent += 1024
        yield b" " * 1024

    async with _Server().client() as client:
      content = b" " * 5000 if announced else chunks()
      reply = await client.post("/generate", content=content)
      _assert_refused(reply, 413, "limit")

  _run(test)


def test_body_that_never_ends_is_given_up(monkeypatch):
  monkeypatch.setattr(server, "_BODY_S", 0.05)

  async def test():
    sent = []

    async def receive():
      await asyncio.sleep(20)

    async def send(message):
      sent.append(message)

    # ASGITransport hands over whole bodies, so the app is called by hand.
    scope = {"type": "http", "headers": [], "method": "POST", "path": "/"}
    await _Server().app(scope, receive, send)
    assert sent[0]["status"] == 408

  _run(test)


def test_unknown_paths_and_methods_are_refused_in_words():
  async def test():
    async with _Server().client() as client:
      _assert_refused(await client.get("/nothing"), 404, "http")
      _assert_refused(await client.get("/generate"), 405, "http")
      _assert_refused(
        await client.post("/generate", content="{"), 422, "invalid"
      )

  _run(test)


def test_full_queue_says_when_to_come_back():
  async def test():
    served = _Server()
    served.engine.go.clear()
    async with served.client() as client:
      first = asyncio.create_task(
        client.post("/generate", json=_request("a", n=3))
      )
      second = asyncio.create_task(
        client.post("/generate", json=_request("b", n=3))
      )
      await _until(lambda: served.engine.num_calls == 2)
      reply = await client.post("/generate", json=_request("c"))
      _assert_refused(reply, 429, "queue_full")
      assert int(reply.headers["retry-after"]) >= 1
      served.engine.go.set()
      assert {(await first).status_code, (await second).status_code} == {200}
      reply = await client.post("/generate", json=_request("c"))
      assert reply.status_code == 200

  _run(test)


def test_repeated_request_joins_the_first_and_is_answered_alike():
  async def test():
    served = _Server()
    served.engine.go.clear()
    async with served.client() as client:
      both = [
        asyncio.create_task(client.post("/generate", json=_request()))
        for _ in range(2)
      ]
      await _until(lambda: served.engine.num_calls)
      await asyncio.sleep(0.02)
      served.engine.go.set()
      replies = [await task for task in both]
      replies.append(await client.post("/generate", json=_request()))
      assert len({reply.text for reply in replies}) == 1
      assert served.engine.num_calls == 1
      other = await client.post("/generate", json=_request(seed=1))
      _assert_refused(other, 409, "request_id")

  _run(test)


def test_client_that_hung_up_finds_its_answer():
  async def test():
    served = _Server()
    served.engine.go.clear()
    async with served.client() as client:
      lost = asyncio.create_task(client.post("/generate", json=_request()))
      await _until(lambda: served.engine.num_calls)
      lost.cancel()
      await asyncio.sleep(0.01)
      served.engine.go.set()
      reply = await client.post("/generate", json=_request())
      assert reply.status_code == 200
      assert served.engine.num_calls == 1

  _run(test)


def test_failed_request_can_be_tried_again():
  async def test():
    served = _Server()
    served.engine.logprob = float("nan")
    async with served.client() as client:
      reply = await client.post("/generate", json=_request())
      _assert_refused(reply, 503, "engine")
      assert "not finite" in reply.text
      served.engine.logprob = -1.0
      reply = await client.post("/generate", json=_request())
      assert reply.status_code == 200

  _run(test)


def test_kept_answers_are_bounded(monkeypatch):
  monkeypatch.setattr(service, "_MAX_ANSWERS", 2)

  async def test():
    served = _Server()
    async with served.client() as client:
      for request_id in "abcca":
        await client.post("/generate", json=_request(request_id))
      assert served.engine.num_calls == 4  # The second c is kept, a is not.
      monkeypatch.setattr(service, "_MAX_ANSWER_BYTES", 1)
      for request_id in "xyy":
        await client.post("/generate", json=_request(request_id))
      assert served.engine.num_calls == 6

  _run(test)


def test_health_answers_while_the_engine_is_busy():
  async def test():
    served = _Server()
    served.engine.go.clear()
    async with served.client() as client:
      task = asyncio.create_task(client.post("/generate", json=_request(n=3)))
      await _until(lambda: served.engine.num_calls)
      reply = await client.get("/health")
      health = wire.Health.model_validate(reply.json())
      assert (health.status, health.num_running) == ("ok", 3)
      served.engine.go.set()
      await task
      assert (await client.get("/health")).json()["num_running"] == 0

  _run(test)


def test_hung_engine_is_noticed_its_work_given_up_and_its_recovery_seen():
  async def test():
    served = _Server(hang_s=0.1)
    served.engine.go.clear()
    async with served.client() as client:
      reply = await client.post("/generate", json=_request("a"))
      _assert_refused(reply, 503, "engine")
      reply = await client.get("/health")
      assert (reply.status_code, reply.json()["status"]) == (503, "hung")
      # Nothing runs any more, yet nobody may be sent there.
      _assert_refused(
        await client.post("/generate", json=_request("b")), 503, "engine"
      )
      served.engine.last_progress_s = time.monotonic() + 0.001
      assert (await client.get("/health")).json()["status"] == "ok"

  _run(test)


def test_idle_engine_is_not_hung():
  async def test():
    served = _Server(hang_s=0.01)
    await asyncio.sleep(0.05)
    async with served.client() as client:
      assert (await client.get("/health")).json()["status"] == "ok"
      reply = await client.post("/generate", json=_request())
      assert reply.status_code == 200

  _run(test)


def test_dead_engine_refuses_at_once():
  async def test():
    served = _Server()
    served.engine.is_alive = False
    async with served.client() as client:
      reply = await client.get("/health")
      assert (reply.status_code, reply.json()["status"]) == (503, "dead")
      reply = await client.post("/generate", json=_request())
      _assert_refused(reply, 503, "engine")

  _run(test)


def test_pushed_weights_are_loaded_once(tmp_path):
  async def test():
    served = _Server()
    async with served.client() as client:
      await client.post("/init_communicator", json=_init(tmp_path))
      update = _push(tmp_path, 3)
      replies = [
        await client.post("/update_weights", json=update) for _ in range(2)
      ]
      assert [reply.status_code for reply in replies] == [200, 200]
      assert served.engine.loaded == [("3", 3)]
      held = wire.Version(version=3, digest=update["digest"])
      assert (await client.get("/version")).json() == held.model_dump()
      reply = await client.post("/generate", json=_request(version=3))
      assert reply.json()["version"] == 3
      reply = await client.post("/generate", json=_request("s", version=2))
      _assert_refused(reply, 409, "version")
      metrics = (await client.get("/metrics")).text
      assert "atlas_rollout_updates_total 1.0\n" in metrics

  _run(test)


def test_update_lets_what_runs_come_to_its_end_and_holds_back_the_rest(
  tmp_path,
):
  async def test():
    served = _Server()
    served.engine.go.clear()
    async with served.client() as client:
      await client.post("/init_communicator", json=_init(tmp_path))
      old = asyncio.create_task(client.post("/generate", json=_request("a")))
      await _until(lambda: served.engine.num_calls == 1)
      update = asyncio.create_task(
        client.post("/update_weights", json=_push(tmp_path, 1))
      )
      await _until(lambda: not served.service._gate.is_set())
      new = asyncio.create_task(client.post("/generate", json=_request("b")))
      await asyncio.sleep(0.02)
      assert served.engine.loaded == []
      assert (await client.get("/health")).json()["num_waiting"] == 1
      served.engine.go.set()
      assert (await update).json()["drain_s"] > 0.0
      versions = [(await task).json()["version"] for task in (old, new)]
      assert versions == [0, 1]

  _run(test)


def test_update_that_cannot_drain_changes_nothing(tmp_path):
  async def test():
    served = _Server(drain_s=0.05)
    served.engine.go.clear()
    async with served.client() as client:
      await client.post("/init_communicator", json=_init(tmp_path))
      task = asyncio.create_task(client.post("/generate", json=_request()))
      await _until(lambda: served.engine.num_calls)
      update = _push(tmp_path, 1)
      reply = await client.post("/update_weights", json=update)
      _assert_refused(reply, 503, "draining")
      assert served.engine.loaded == []
      served.engine.go.set()
      assert (await task).json()["version"] == 0
      reply = await client.post("/update_weights", json=update)
      assert reply.status_code == 200

  _run(test)


def test_second_update_joins_the_first_or_is_refused(tmp_path):
  async def test():
    served = _Server()
    served.engine.go.clear()
    async with served.client() as client:
      await client.post("/init_communicator", json=_init(tmp_path))
      task = asyncio.create_task(client.post("/generate", json=_request()))
      await _until(lambda: served.engine.num_calls)
      update = _push(tmp_path, 1)
      same = [
        asyncio.create_task(client.post("/update_weights", json=update))
        for _ in range(2)
      ]
      await _until(lambda: served.service._update)
      reply = await client.post("/update_weights", json=_push(tmp_path, 2))
      _assert_refused(reply, 409, "busy")
      served.engine.go.set()
      assert [(await one).status_code for one in (*same, task)] == [200] * 3
      assert served.engine.loaded == [("1", 1)]

  _run(test)


def test_spoiled_pushes_change_nothing(tmp_path):
  async def test():
    served = _Server()
    async with served.client() as client:
      await client.post("/init_communicator", json=_init(tmp_path))
      torn = _push(tmp_path, 1)
      (tmp_path / "1" / manifest.NAME).unlink()
      altered = _push(tmp_path, 2)
      path = tmp_path / "2" / "model.safetensors"
      path.write_bytes(path.read_bytes()[:-1] + b"\x01")
      other = {**_push(tmp_path, 4), "digest": "0" * 64}
      absent = {**other, "version": 9}
      for update in (torn, altered, other, absent):
        reply = await client.post("/update_weights", json=update)
        _assert_refused(reply, 409, "weights")
      assert served.engine.loaded == []
      assert (await client.get("/health")).json()["status"] == "ok"
      assert (await client.get("/version")).json()["version"] == 0

  _run(test)


def test_versions_only_grow_within_a_channel(tmp_path):
  async def test():
    async with _Server().client() as client:
      await client.post("/init_communicator", json=_init(tmp_path))
      new, old = _push(tmp_path, 7), _push(tmp_path, 6)
      assert (await client.post("/update_weights", json=new)).status_code == 200
      for stale in (old, {**new, "digest": "0" * 64}):
        reply = await client.post("/update_weights", json=stale)
        _assert_refused(reply, 409, "stale")
      # A run that resumes opens a channel anew, and may be behind.
      await client.post("/close_communicator", json={"trainer_id": "t"})
      await client.post("/init_communicator", json=_init(tmp_path))
      reply = await client.post("/update_weights", json=old)
      assert reply.status_code == 200

  _run(test)


def test_load_that_fails_halfway_leaves_a_dead_server(tmp_path):
  async def test():
    served = _Server()
    async with served.client() as client:
      await client.post("/init_communicator", json=_init(tmp_path))
      served.engine.load_error = errors.CheckpointError(
        "x", where="x", why="x", fix="x"
      )
      update = _push(tmp_path, 1)
      reply = await client.post("/update_weights", json=update)
      _assert_refused(reply, 409, "weights")
      assert (await client.get("/health")).json()["status"] == "ok"
      served.engine.load_error = RuntimeError("worker died")
      reply = await client.post("/update_weights", json=update)
      _assert_refused(reply, 500, "internal")
      assert (await client.get("/health")).json()["status"] == "dead"
      assert (await client.get("/version")).json()["version"] == 0

  _run(test)


def test_handshake_refuses_whatever_differs(tmp_path):
  async def test():
    transposed = [
      {"name": "a.weight", "shape": [4, 3]},
      {"name": "b.weight", "shape": [5]},
    ]
    async with _Server(allowed=tmp_path).client() as client:
      for changes, error in [
        ({"role": "student"}, "role"),
        ({"tokenizer_digest": "other"}, "tokenizer"),
        ({"tensors": transposed}, "weights"),
        ({"tensors": transposed[1:]}, "weights"),
        ({"weights_root": str(tmp_path / "absent")}, "weights_root"),
        ({"weights_root": str(tmp_path.parent)}, "weights_root"),
        ({"weights_root": "."}, "weights_root"),
      ]:
        body = _init(tmp_path, **changes)
        reply = await client.post("/init_communicator", json=body)
        _assert_refused(reply, 409, error)
      reply = await client.post("/update_weights", json=_push(tmp_path, 1))
      _assert_refused(reply, 409, "no_channel")

  _run(test)


def test_relative_root_is_refused_wherever_the_server_runs(
  tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)

  async def test():
    async with _Server().client() as client:
      reply = await client.post("/init_communicator", json=_init("."))
      _assert_refused(reply, 409, "weights_root")

  _run(test)


def test_second_trainer_waits_until_the_first_is_gone(tmp_path):
  async def test():
    served = _Server()
    async with served.client() as client:
      for trainer_id, at_s, status in [
        ("t", 0.0, 200),
        ("u", 9.0, 409),  # The refusal is not a word from t.
        ("t", 9.5, 200),  # A heartbeat.
        ("u", 19.0, 409),
        ("u", 19.6, 200),
        ("t", 19.7, 409),
      ]:
        served.now = at_s
        body = _init(tmp_path, trainer_id)
        reply = await client.post("/init_communicator", json=body)
        assert reply.status_code == status, (trainer_id, at_s)
      for path, body in [
        ("/update_weights", _push(tmp_path, 1)),
        ("/close_communicator", {"trainer_id": "t"}),
      ]:
        reply = await client.post(path, json=body)
        _assert_refused(reply, 409, "other_trainer")

  _run(test)


def test_trainer_is_not_lost_while_it_waits_for_an_answer(tmp_path):
  async def test():
    served = _Server()
    served.engine.go.clear()
    async with served.client() as client:
      await client.post("/init_communicator", json=_init(tmp_path))
      task = asyncio.create_task(client.post("/generate", json=_request()))
      await _until(lambda: served.engine.num_calls)
      served.now = 100.0
      assert served.weights.trainer_id == "t"
      served.engine.go.set()
      await task
      served.now = 109.0
      assert served.weights.trainer_id == "t"
      served.now = 111.0
      assert served.weights.trainer_id is None

  _run(test)


def test_lost_trainer_is_noticed_without_anybody_asking(tmp_path, monkeypatch):
  monkeypatch.setattr(server, "_WATCH_S", 0.005)

  async def test():
    served = _Server()
    served.weights.init(wire.InitRequest(**_init(tmp_path)))
    async with served.app.router.lifespan_context(served.app):
      await asyncio.sleep(0.02)
      assert served.weights._open is not None
      served.now = 10.5
      await _until(lambda: served.weights._open is None)

  _run(test)


def test_student_weights_are_never_replaced(tmp_path):
  async def test():
    served = _Server(role="student")
    async with served.client() as client:
      body = _init(tmp_path, role="student")
      reply = await client.post("/init_communicator", json=body)
      assert reply.status_code == 200
      reply = await client.post("/update_weights", json=_push(tmp_path, 1))
      _assert_refused(reply, 409, "frozen")
    assert served.engine.loaded == []

  _run(test)


def test_prompts_are_in_no_log(caplog):
  async def test():
    async with _Server().client() as client:
      for n in (1, 9):
        prompts = [{"row_id": "x", "text": "the secret question"}]
        await client.post("/generate", json=_request(prompts=prompts, n=n))

  caplog.set_level("INFO")
  _run(test)
  assert "1 prompts x 1, 2 tokens" in caplog.text
  assert "secret" not in caplog.text
