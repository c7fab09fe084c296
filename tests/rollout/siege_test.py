# SPDX-License-Identifier: Apache-2.0
"""Tests a server in a separate process against misbehaving clients."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import time

import httpx2
import pytest

from tests import scripted_server

_ROOT = pathlib.Path(__file__).parents[2]
_HEAD_S, _MAX_CONNECTIONS = 1.5, 550
_SERVE = f"""
import asyncio
from rollout.server import listen
from tests import scripted_server
listen._HEAD_S = {_HEAD_S}
listen._MAX_CONNECTIONS = {_MAX_CONNECTIONS}
with listen.bind("127.0.0.1", 0) as bound:
  print(bound.getsockname()[1], flush=True)
  async def serve():
    app = scripted_server.Server(max_body_bytes=2**20).app
    await listen.serve(app, bound, drain_s=1.0)
  asyncio.run(serve())
"""
_TRAIN = """
import sys, time
from rollout.remote import client
from rollout.remote import fleet
from rollout.remote import http_sampler
shapes = {"a.weight": (3, 4), "b.weight": (5,)}
channel = fleet.ChannelTerms("policy", shapes, "tok", "/dev/shm", 30.0, 20.0)
deadlines = client.Deadlines(5.0, 5.0, 5.0)
with http_sampler.HttpSampler(
  [sys.argv[1]],
  channel=channel,
  deadlines=deadlines,
  token=None,
  publish=lambda params, version: "",
  max_rows=4,
):
  print("up", flush=True)
  time.sleep(60)
"""


@pytest.fixture(scope="module")
def served():
  with subprocess.Popen(
    [sys.executable, "-c", _SERVE], cwd=_ROOT, stdout=subprocess.PIPE
  ) as process:
    try:
      process.port = int(process.stdout.readline())
      process.url = f"http://127.0.0.1:{process.port}"
      with httpx2.Client(base_url=process.url, timeout=10.0) as client:
        process.client = client
        _wait(lambda: _is_up(client))
        yield process
      process.terminate()
      process.wait(20)
    finally:
      process.kill()


def _is_up(client):
  with contextlib.suppress(httpx2.TransportError):
    return client.get("/health").status_code == 200
  return False


def _wait(is_so, seconds=30.0):
  end = time.monotonic() + seconds
  while not is_so():
    assert time.monotonic() < end, f"not true within {seconds} s"
    time.sleep(0.05)


def _check_works(served, name):
  start = time.monotonic()
  body = scripted_server.request(name)
  assert served.client.post("/generate", json=body).status_code == 200
  assert time.monotonic() - start < 5.0


def _memory(served):
  status = pathlib.Path(f"/proc/{served.pid}/status").read_text()
  (line,) = (x for x in status.splitlines() if x.startswith("VmHWM:"))
  return int(line.split()[1]) * 1024


def _is_closed(connection):
  connection.setblocking(False)
  try:
    return connection.recv(1) == b""
  except BlockingIOError:
    return False
  except ConnectionError:
    return True


def test_connections_with_incomplete_headers_are_closed(served):
  with contextlib.ExitStack() as stack:
    slow = [
      stack.enter_context(socket.create_connection(("127.0.0.1", served.port)))
      for _ in range(50)
    ]
    start = time.monotonic()
    for connection in slow:
      connection.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nX-A: ")
    _check_works(served, "slow heads")
    while time.monotonic() - start < _HEAD_S + 2.0:
      for connection in slow:
        with contextlib.suppress(ConnectionError):
          connection.sendall(b"a")  # Does not complete the headers.
      time.sleep(0.2)
    assert all(map(_is_closed, slow))
  _check_works(served, "after slow heads")


def test_a_kept_connection_with_slow_headers_is_closed(served):
  with socket.create_connection(("127.0.0.1", served.port)) as kept:
    kept.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"200 OK" in kept.recv(4096)
    kept.sendall(b"GET /version HT")
    kept.settimeout(_HEAD_S + 3.0)
    with contextlib.suppress(ConnectionError):
      while kept.recv(4096):
        pass


def test_hundreds_of_idle_connections_do_not_block_requests(served):
  with contextlib.ExitStack() as stack:
    idle = [
      stack.enter_context(socket.create_connection(("127.0.0.1", served.port)))
      for _ in range(500)
    ]
    _check_works(served, "idle")
    _wait(lambda: all(map(_is_closed, idle)), seconds=_HEAD_S + 5.0)
  descriptors = len(os.listdir(f"/proc/{served.pid}/fd"))
  assert descriptors < 100


def test_an_endless_body_is_cut_off_and_not_buffered(served):
  before, piece = _memory(served), b"10000\r\n" + b" " * 65536 + b"\r\n"
  with socket.create_connection(("127.0.0.1", served.port)) as huge:
    huge.settimeout(10.0)
    huge.sendall(
      b"POST /generate HTTP/1.1\r\nHost: x\r\n"
      b"Transfer-Encoding: chunked\r\n\r\n"
    )
    num_bytes = 0
    with contextlib.suppress(ConnectionError):
      while num_bytes < 2**30:
        huge.sendall(piece)
        num_bytes += 65536
  assert num_bytes < 2**27  # Out of 1 GiB: what was in socket buffers.
  assert _memory(served) - before < 2**25
  _check_works(served, "after a huge body")


def test_open_connections_are_limited(served):
  with contextlib.ExitStack() as stack:
    for _ in range(_MAX_CONNECTIONS + 100):
      stack.enter_context(socket.create_connection(("127.0.0.1", served.port)))
    assert len(os.listdir(f"/proc/{served.pid}/fd")) < _MAX_CONNECTIONS + 50
  _wait(lambda: _is_up(served.client))


def test_absurd_numbers_are_rejected_at_no_cost(served):
  before = _memory(served)
  prompts = [{"row_id": "x", "token_ids": [1]}] * 10**4
  for i, changes in enumerate(
    [{"n": 10**9}, {"max_tokens": 10**9}, {"prompts": prompts}]
  ):
    body = scripted_server.request(f"absurd {i}", **changes)
    assert served.client.post("/generate", json=body).status_code == 422
  assert _memory(served) - before < 2**26
  _check_works(served, "after absurd numbers")


def test_a_killed_trainer_is_detected_and_replaced(served):
  def is_connected():
    text = served.client.get("/metrics").text
    return "atlas_rollout_trainer_connected 1.0\n" in text

  for _ in range(
    2
  ):  # The second need not wait for the first one's heartbeat to expire.
    start = time.monotonic()
    with subprocess.Popen(
      [sys.executable, "-c", _TRAIN, served.url],
      cwd=_ROOT,
      stdout=subprocess.PIPE,
    ) as trainer:
      assert trainer.stdout.readline() == b"up\n"
      assert time.monotonic() - start < 25.0  # Its heartbeat is 30 s.
      assert is_connected()
      trainer.kill()
      _wait(lambda: not is_connected(), seconds=5.0)
