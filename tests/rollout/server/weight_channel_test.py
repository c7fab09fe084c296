# SPDX-License-Identifier: Apache-2.0
"""Tests who may replace a server's weights, and with which ones."""

import asyncio
import subprocess
import sys

from rollout import process_name, wire
from rollout.server import app
from tests import processes, scripted_server

_ROOT = processes.ROOT
_TRAINER = """
import time
from rollout import process_name
print(process_name.this_process(), flush=True)
time.sleep(60)
"""


def test_versions_increase_within_a_channel(tmp_path):
  async def test():
    async with scripted_server.Server().client() as client:
      await client.post(
        "/init_communicator", json=scripted_server.init(tmp_path)
      )
      new, old = (
        scripted_server.push(tmp_path, 7),
        scripted_server.push(tmp_path, 6),
      )
      assert (await client.post("/update_weights", json=new)).status_code == 200
      for stale in (old, {**new, "digest": "0" * 64}):
        reply = await client.post("/update_weights", json=stale)
        scripted_server.assert_rejected(reply, 409, "stale")
      # A resumed run opens a new channel, and may push an older version.
      await client.post("/close_communicator", json={"trainer_id": "t"})
      await client.post(
        "/init_communicator", json=scripted_server.init(tmp_path)
      )
      reply = await client.post("/update_weights", json=old)
      assert reply.status_code == 200

  scripted_server.run(test)


def test_the_handshake_rejects_any_mismatch(tmp_path):
  async def test():
    transposed = [
      {"name": "a.weight", "shape": [4, 3]},
      {"name": "b.weight", "shape": [5]},
    ]
    async with scripted_server.Server(allowed=tmp_path).client() as client:
      for changes, error in [
        ({"role": "student"}, "role"),
        ({"tokenizer_digest": "other"}, "tokenizer"),
        ({"tensors": transposed}, "weights"),
        ({"tensors": transposed[1:]}, "weights"),
        ({"weights_root": str(tmp_path / "absent")}, "weights_root"),
        ({"weights_root": str(tmp_path.parent)}, "weights_root"),
        ({"weights_root": "."}, "weights_root"),
        ({"weights_root": "/" + 300 * "a"}, "weights_root"),
      ]:
        body = scripted_server.init(tmp_path, **changes)
        reply = await client.post("/init_communicator", json=body)
        scripted_server.assert_rejected(reply, 409, error)
      for changes in (
        {"weights_root": "/\0"},
        {"heartbeat_s": 1e6},  # A lost trainer would hold the channel.
        {"heartbeat_s": 0},
        {"trainer_id": "t" * 300},
      ):
        body = scripted_server.init(tmp_path, **changes)
        reply = await client.post("/init_communicator", json=body)
        scripted_server.assert_rejected(reply, 422, "invalid")
      reply = await client.post(
        "/update_weights", json=scripted_server.push(tmp_path, 1)
      )
      scripted_server.assert_rejected(reply, 409, "no_channel")

  scripted_server.run(test)


def test_a_relative_weights_root_is_rejected(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)

  async def test():
    async with scripted_server.Server().client() as client:
      reply = await client.post(
        "/init_communicator", json=scripted_server.init(".")
      )
      scripted_server.assert_rejected(reply, 409, "weights_root")

  scripted_server.run(test)


def test_a_second_trainer_waits_until_the_first_is_lost(tmp_path):
  async def test():
    served = scripted_server.Server()
    async with served.client() as client:
      for trainer_id, at_s, status in [
        ("t", 0.0, 200),
        ("u", 9.0, 409),  # A rejected request is no heartbeat of t.
        ("t", 9.5, 200),  # A heartbeat.
        ("u", 19.0, 409),
        ("u", 19.6, 200),
        ("t", 19.7, 409),
      ]:
        served.now = at_s
        body = scripted_server.init(tmp_path, trainer_id)
        reply = await client.post("/init_communicator", json=body)
        assert reply.status_code == status, (trainer_id, at_s)
      for path, body in [
        ("/update_weights", scripted_server.push(tmp_path, 1)),
        ("/close_communicator", {"trainer_id": "t"}),
      ]:
        reply = await client.post(path, json=body)
        scripted_server.assert_rejected(reply, 409, "other_trainer")

  scripted_server.run(test)


def test_a_trainer_is_not_lost_while_it_waits_for_a_response(tmp_path):
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
      served.now = 100.0
      assert served.weights.trainer_id == "t"
      served.engine.go.set()
      await task
      served.now = 109.0
      assert served.weights.trainer_id == "t"
      served.now = 111.0
      assert served.weights.trainer_id is None

  scripted_server.run(test)


def test_a_lost_trainer_is_detected_without_a_request(tmp_path, monkeypatch):
  monkeypatch.setattr(app, "_WATCH_S", 0.005)

  async def test():
    served = scripted_server.Server()
    served.weights.init(wire.InitRequest(**scripted_server.init(tmp_path)))
    async with served.app.router.lifespan_context(served.app):
      await asyncio.sleep(0.02)
      assert served.weights._open is not None
      served.now = 10.5
      await scripted_server.until(lambda: served.weights._open is None)

  scripted_server.run(test)


def test_a_trainer_killed_on_this_machine_is_replaced_immediately(tmp_path):
  async def test():
    served = scripted_server.Server()
    with subprocess.Popen(
      [sys.executable, "-c", _TRAINER], cwd=_ROOT, stdout=subprocess.PIPE
    ) as trainer:
      name = trainer.stdout.readline().decode().strip()
      async with served.client() as client:
        old = scripted_server.init(tmp_path, process=name)
        new = scripted_server.init(
          tmp_path, "u", process=process_name.this_process()
        )
        await client.post("/init_communicator", json=old)
        reply = await client.post("/init_communicator", json=new)
        scripted_server.assert_rejected(reply, 409, "other_trainer")
        trainer.kill()
        trainer.wait(10)
        with served.weights.loading(1):  # A load in progress finishes first.
          reply = await client.post("/init_communicator", json=new)
          scripted_server.assert_rejected(reply, 409, "other_trainer")
        reply = await client.post("/init_communicator", json=new)
        assert reply.status_code == 200

  scripted_server.run(test)


def test_student_weights_are_never_replaced(tmp_path):
  async def test():
    served = scripted_server.Server(role="student")
    async with served.client() as client:
      body = scripted_server.init(tmp_path, role="student")
      reply = await client.post("/init_communicator", json=body)
      assert reply.status_code == 200
      reply = await client.post(
        "/update_weights", json=scripted_server.push(tmp_path, 1)
      )
      scripted_server.assert_rejected(reply, 409, "frozen")
    assert served.engine.loaded == []

  scripted_server.run(test)
