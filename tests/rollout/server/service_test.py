# SPDX-License-Identifier: Apache-2.0
"""Tests the service: limits, caching, updates, failures."""

import asyncio
import time

import pytest

from atlas_jax import errors
from rollout import manifest, wire
from rollout.server import service
from tests import scripted_server


@pytest.mark.parametrize(
  ("changes", "error"),
  [
    ({"n": 4}, "limit"),
    ({"max_tokens": 17}, "limit"),
    ({"prompts": [{"row_id": "x", "token_ids": [1]}] * 5}, "limit"),
    ({"prompts": [{"row_id": "x", "token_ids": [1]}] * 4, "n": 2}, "limit"),
    (
      {"prompts": [{"row_id": "x", "text": "a" * 500}] * 2 + [{"text": "b"}]},
      "limit",
    ),
    ({"request_id": "r" * 300}, "invalid"),
    ({"top_k": 2**31}, "invalid"),
    ({"top_k": -1}, "invalid"),
    ({"seed": 2**32}, "invalid"),
    ({"seed": -1}, "invalid"),
    ({"version": 2**63}, "invalid"),
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
def test_requests_beyond_a_limit_are_rejected_before_they_run(changes, error):
  async def test():
    served = scripted_server.Server()
    async with served.client() as client:
      reply = await client.post(
        "/generate", json=scripted_server.request(**changes)
      )
      scripted_server.assert_rejected(reply, 422, error)
    assert served.engine.num_calls == 0

  scripted_server.run(test)


def test_a_prompt_that_is_too_long_is_rejected_with_its_row():
  async def test():
    served = scripted_server.Server()
    prompts = [
      {"row_id": "short", "token_ids": [1] * 24},
      {"row_id": "long-one", "token_ids": [1] * 25},
    ]
    async with served.client() as client:
      reply = await client.post(
        "/generate", json=scripted_server.request(prompts=prompts)
      )
      scripted_server.assert_rejected(reply, 422, "prompt")
      assert "long-one" in reply.text
      reply = await client.post(
        "/generate", json=scripted_server.request(prompts=prompts[:1])
      )
      assert reply.status_code == 200
    assert served.engine.num_calls == 1

  scripted_server.run(test)


def test_a_full_queue_sets_retry_after():
  async def test():
    served = scripted_server.Server()
    served.engine.go.clear()
    async with served.client() as client:
      first = asyncio.create_task(
        client.post("/generate", json=scripted_server.request("a", n=3))
      )
      second = asyncio.create_task(
        client.post("/generate", json=scripted_server.request("b", n=3))
      )
      await scripted_server.until(lambda: served.engine.num_calls == 2)
      reply = await client.post("/generate", json=scripted_server.request("c"))
      scripted_server.assert_rejected(reply, 429, "queue_full")
      assert int(reply.headers["retry-after"]) >= 1
      served.engine.go.set()
      assert {(await first).status_code, (await second).status_code} == {200}
      reply = await client.post("/generate", json=scripted_server.request("c"))
      assert reply.status_code == 200

  scripted_server.run(test)


def test_a_repeated_request_joins_the_first_and_gets_the_same_answer():
  async def test():
    served = scripted_server.Server()
    served.engine.go.clear()
    async with served.client() as client:
      both = [
        asyncio.create_task(
          client.post("/generate", json=scripted_server.request())
        )
        for _ in range(2)
      ]
      await scripted_server.until(lambda: served.engine.num_calls)
      await asyncio.sleep(0.02)
      served.engine.go.set()
      replies = [await task for task in both]
      replies.append(
        await client.post("/generate", json=scripted_server.request())
      )
      assert len({reply.text for reply in replies}) == 1
      assert served.engine.num_calls == 1
      other = await client.post(
        "/generate", json=scripted_server.request(seed=1)
      )
      scripted_server.assert_rejected(other, 409, "request_id")

  scripted_server.run(test)


def test_a_client_that_reconnects_gets_its_answer():
  async def test():
    served = scripted_server.Server()
    served.engine.go.clear()
    async with served.client() as client:
      lost = asyncio.create_task(
        client.post("/generate", json=scripted_server.request())
      )
      await scripted_server.until(lambda: served.engine.num_calls)
      lost.cancel()
      await asyncio.sleep(0.01)
      served.engine.go.set()
      reply = await client.post("/generate", json=scripted_server.request())
      assert reply.status_code == 200
      assert served.engine.num_calls == 1

  scripted_server.run(test)


def test_a_failed_request_can_be_retried():
  async def test():
    served = scripted_server.Server()
    served.engine.logprob = float("nan")
    async with served.client() as client:
      reply = await client.post("/generate", json=scripted_server.request())
      scripted_server.assert_rejected(reply, 503, "engine")
      assert "non-finite" in reply.text
      served.engine.logprob = -1.0
      reply = await client.post("/generate", json=scripted_server.request())
      assert reply.status_code == 200

  scripted_server.run(test)


def test_the_answer_cache_is_bounded(monkeypatch):
  monkeypatch.setattr(service, "_MAX_ANSWERS", 2)

  async def test():
    served = scripted_server.Server()
    async with served.client() as client:
      for request_id in "abcca":
        await client.post("/generate", json=scripted_server.request(request_id))
      assert (
        served.engine.num_calls == 4
      )  # The second "c" is cached, "a" is not.
      monkeypatch.setattr(service, "_MAX_ANSWER_BYTES", 1)
      for request_id in "xyy":
        await client.post("/generate", json=scripted_server.request(request_id))
      assert served.engine.num_calls == 6

  scripted_server.run(test)


def test_health_responds_while_the_engine_is_busy():
  async def test():
    served = scripted_server.Server()
    served.engine.go.clear()
    async with served.client() as client:
      task = asyncio.create_task(
        client.post("/generate", json=scripted_server.request(n=3))
      )
      await scripted_server.until(lambda: served.engine.num_calls)
      reply = await client.get("/health")
      health = wire.Health.model_validate(reply.json())
      assert (health.status, health.num_running) == ("ok", 3)
      served.engine.go.set()
      await task
      assert (await client.get("/health")).json()["num_running"] == 0

  scripted_server.run(test)


def test_a_hung_engine_is_detected_and_recovers():
  async def test():
    served = scripted_server.Server(hang_s=0.1)
    served.engine.go.clear()
    async with served.client() as client:
      reply = await client.post("/generate", json=scripted_server.request("a"))
      scripted_server.assert_rejected(reply, 503, "engine")
      reply = await client.get("/health")
      assert (reply.status_code, reply.json()["status"]) == (503, "hung")
      # Nothing runs any more, but the engine still counts as hung.
      scripted_server.assert_rejected(
        await client.post("/generate", json=scripted_server.request("b")),
        503,
        "engine",
      )
      served.engine.last_progress_s = time.monotonic() + 0.001
      assert (await client.get("/health")).json()["status"] == "ok"

  scripted_server.run(test)


def test_an_idle_engine_is_not_hung():
  async def test():
    served = scripted_server.Server(hang_s=0.01)
    await asyncio.sleep(0.05)
    async with served.client() as client:
      assert (await client.get("/health")).json()["status"] == "ok"
      reply = await client.post("/generate", json=scripted_server.request())
      assert reply.status_code == 200

  scripted_server.run(test)


def test_a_dead_engine_rejects_requests_immediately():
  async def test():
    served = scripted_server.Server()
    served.engine.is_alive = False
    async with served.client() as client:
      reply = await client.get("/health")
      assert (reply.status_code, reply.json()["status"]) == (503, "dead")
      reply = await client.post("/generate", json=scripted_server.request())
      scripted_server.assert_rejected(reply, 503, "engine")

  scripted_server.run(test)


def test_metrics_report_speed_queue_and_pushes(tmp_path, caplog):
  async def test():
    served = scripted_server.Server()
    served.engine.go.clear()
    async with served.client() as client:
      body = scripted_server.init(tmp_path)
      await client.post("/init_communicator", json=body)
      running = asyncio.create_task(
        client.post("/generate", json=scripted_server.request("a", n=2))
      )
      await scripted_server.until(lambda: served.engine.num_calls == 1)
      push = scripted_server.push(tmp_path, 1)
      update = asyncio.create_task(client.post("/update_weights", json=push))
      await scripted_server.until(lambda: not served.service._gate.is_set())
      queued = asyncio.create_task(
        client.post("/generate", json=scripted_server.request("b"))
      )
      await asyncio.sleep(0.1)
      seen = await _metrics(client)
      assert (seen["running_completions"], seen["waiting_completions"]) == (
        2,
        1,
      )
      served.engine.go.set()
      await asyncio.gather(running, update, queued)
      seen = await _metrics(client)
      assert (await queued).json()["queue_s"] >= 0.05
    assert seen["generated_tokens_total"] == 2 * 3
    assert seen["busy_seconds_total"] >= 0.1
    assert 0.0 < seen["tokens_per_second"] <= 6 / 0.1
    assert seen["queue_seconds_total"] >= 0.05
    assert seen["drain_seconds_total"] >= 0.05
    assert seen["push_seconds_total"] > seen["drain_seconds_total"]
    assert seen["engine_load"] == 0.5

  caplog.set_level("INFO")
  scripted_server.run(test)
  for logged in ("/s), version 1, queued", "s, drain ", "s, load "):
    assert logged in caplog.text


async def _metrics(client):
  text = (await client.get("/metrics")).text
  rows = [line.split() for line in text.splitlines() if line[0] != "#"]
  return {k.removeprefix("atlas_rollout_"): float(v) for k, v in rows}


def test_prompts_are_not_logged(caplog):
  async def test():
    async with scripted_server.Server().client() as client:
      for n in (1, 9):
        prompts = [{"row_id": "x", "text": "the secret question"}]
        await client.post(
          "/generate", json=scripted_server.request(prompts=prompts, n=n)
        )

  caplog.set_level("INFO")
  scripted_server.run(test)
  assert "1 prompts x 1, 2 tokens" in caplog.text
  assert "secret" not in caplog.text


def test_a_prefix_cache_in_use_is_reported():
  async def test():
    served = scripted_server.Server()
    async with served.client() as client:
      served.engine.is_cache_used = True
      reply = await client.post("/reset_prefix_cache")
      scripted_server.assert_rejected(reply, 503, "running")
      served.engine.is_cache_used = False
      assert (await client.post("/reset_prefix_cache")).status_code == 200
      assert served.engine.num_resets == 1

  scripted_server.run(test)


def test_pushed_weights_are_loaded_once(tmp_path):
  async def test():
    served = scripted_server.Server()
    async with served.client() as client:
      await client.post(
        "/init_communicator", json=scripted_server.init(tmp_path)
      )
      update = scripted_server.push(tmp_path, 3)
      replies = [
        await client.post("/update_weights", json=update) for _ in range(2)
      ]
      assert [reply.status_code for reply in replies] == [200, 200]
      assert served.engine.loaded == [("3", 3)]
      held = wire.Version(version=3, digest=update["digest"])
      assert (await client.get("/version")).json() == held.model_dump()
      reply = await client.post(
        "/generate", json=scripted_server.request(version=3)
      )
      assert reply.json()["version"] == 3
      reply = await client.post(
        "/generate", json=scripted_server.request("s", version=2)
      )
      scripted_server.assert_rejected(reply, 409, "version")
      metrics = (await client.get("/metrics")).text
      assert "atlas_rollout_updates_total 1.0\n" in metrics

  scripted_server.run(test)


def test_an_update_drains_running_requests_and_holds_back_new_ones(
  tmp_path,
):
  async def test():
    served = scripted_server.Server()
    served.engine.go.clear()
    async with served.client() as client:
      await client.post(
        "/init_communicator", json=scripted_server.init(tmp_path)
      )
      old = asyncio.create_task(
        client.post("/generate", json=scripted_server.request("a"))
      )
      await scripted_server.until(lambda: served.engine.num_calls == 1)
      update = asyncio.create_task(
        client.post("/update_weights", json=scripted_server.push(tmp_path, 1))
      )
      await scripted_server.until(lambda: not served.service._gate.is_set())
      new = asyncio.create_task(
        client.post("/generate", json=scripted_server.request("b"))
      )
      await asyncio.sleep(0.02)
      assert served.engine.loaded == []
      assert (await client.get("/health")).json()["num_waiting"] == 1
      served.engine.go.set()
      assert (await update).json()["drain_s"] > 0.0
      versions = [(await task).json()["version"] for task in (old, new)]
      assert versions == [0, 1]

  scripted_server.run(test)


def test_update_that_cannot_drain_changes_nothing(tmp_path):
  async def test():
    served = scripted_server.Server(drain_s=0.05)
    served.engine.go.clear()
    async with served.client() as client:
      await client.post(
        "/init_communicator", json=scripted_server.init(tmp_path)
      )
      task = asyncio.create_task(
        client.post("/generate", json=scripted_server.request())
      )
      await scripted_server.until(lambda: served.engine.num_calls)
      update = scripted_server.push(tmp_path, 1)
      reply = await client.post("/update_weights", json=update)
      scripted_server.assert_rejected(reply, 503, "draining")
      assert served.engine.loaded == []
      served.engine.go.set()
      assert (await task).json()["version"] == 0
      reply = await client.post("/update_weights", json=update)
      assert reply.status_code == 200

  scripted_server.run(test)


def test_a_second_update_joins_the_first_or_is_rejected(tmp_path):
  async def test():
    served = scripted_server.Server()
    served.engine.go.clear()
    async with served.client() as client:
      await client.post(
        "/init_communicator", json=scripted_server.init(tmp_path)
      )
      task = asyncio.create_task(
        client.post("/generate", json=scripted_server.request())
      )
      await scripted_server.until(lambda: served.engine.num_calls)
      update = scripted_server.push(tmp_path, 1)
      same = [
        asyncio.create_task(client.post("/update_weights", json=update))
        for _ in range(2)
      ]
      await scripted_server.until(lambda: served.weights.held.loading == 1)
      reply = await client.post(
        "/update_weights", json=scripted_server.push(tmp_path, 2)
      )
      scripted_server.assert_rejected(reply, 409, "busy")
      served.engine.go.set()
      assert [(await one).status_code for one in (*same, task)] == [200] * 3
      assert served.engine.loaded == [("1", 1)]

  scripted_server.run(test)


def test_corrupt_pushes_change_nothing(tmp_path):
  async def test():
    served = scripted_server.Server()
    async with served.client() as client:
      await client.post(
        "/init_communicator", json=scripted_server.init(tmp_path)
      )
      torn = scripted_server.push(tmp_path, 1)
      (tmp_path / "1" / manifest.NAME).unlink()
      altered = scripted_server.push(tmp_path, 2)
      path = tmp_path / "2" / "model.safetensors"
      path.write_bytes(path.read_bytes()[:-1] + b"\x01")
      other = {**scripted_server.push(tmp_path, 4), "digest": "0" * 64}
      absent = {**other, "version": 9}
      outside = {**other, "version": "../../4"}
      reply = await client.post("/update_weights", json=outside)
      scripted_server.assert_rejected(reply, 422, "invalid")
      for update in (torn, altered, other, absent):
        reply = await client.post("/update_weights", json=update)
        scripted_server.assert_rejected(reply, 409, "weights")
      assert served.engine.loaded == []
      assert (await client.get("/health")).json()["status"] == "ok"
      assert (await client.get("/version")).json()["version"] == 0

  scripted_server.run(test)


def test_load_that_fails_halfway_leaves_a_dead_server(tmp_path):
  async def test():
    served = scripted_server.Server()
    async with served.client() as client:
      await client.post(
        "/init_communicator", json=scripted_server.init(tmp_path)
      )
      served.engine.load_error = errors.CheckpointError(
        "x", where="x", why="x", fix="x"
      )
      update = scripted_server.push(tmp_path, 1)
      reply = await client.post("/update_weights", json=update)
      scripted_server.assert_rejected(reply, 409, "weights")
      assert (await client.get("/health")).json()["status"] == "ok"
      served.engine.load_error = RuntimeError("worker died")
      reply = await client.post("/update_weights", json=update)
      scripted_server.assert_rejected(reply, 500, "internal")
      assert (await client.get("/health")).json()["status"] == "dead"
      assert (await client.get("/version")).json()["version"] == 0

  scripted_server.run(test)
