# SPDX-License-Identifier: Apache-2.0
"""Tests the client against every fault of a server."""

import asyncio
import pathlib
import subprocess
import sys
import time

import pytest
import stamina

from atlas_jax import errors
from rollout import wire
from rollout.remote import client
from tests import fault_server

Fault = fault_server.Fault
_DEADLINES = client.Deadlines(generate_s=1.0, update_s=1.0, control_s=1.0)


@pytest.fixture(scope="module")
def _one_server():
  server = fault_server.FaultServer()
  yield server
  server.close()


@pytest.fixture
def server(_one_server):
  _one_server.script.clear()
  _one_server.requests.clear()
  _one_server.num_generated = 0
  return _one_server


@pytest.fixture(autouse=True)
def _no_backoff():
  # Shortens the waits between retries; the number of retries is unchanged.
  with stamina.set_testing(True, attempts=100):
    yield


def _request(**changes):
  fields = {
    "request_id": "r1",
    "prompts": [wire.PromptIn(row_id=row, token_ids=[5, 6]) for row in "ab"],
    "n": 2,
    "max_tokens": 4,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "seed": 0,
  }
  return wire.GenerateRequest(**{**fields, **changes})


def _call(server, name, *args, deadlines=_DEADLINES, token=None):
  async def run():
    one = client.Client(server.url, deadlines=deadlines, token=token)
    try:
      return await getattr(one, name)(*args)
    finally:
      await one.close()

  return asyncio.run(run())


def _set(name, value):
  """Edits a field of the first completion."""

  def edit(reply):
    reply["completions"][0][0][name] = value

  return Fault("edit", edit)


def test_a_response_is_returned_unchanged(server):
  reply = _call(server, "generate", _request())
  assert reply.request_id == "r1"
  assert [len(group) for group in reply.completions] == [2, 2]
  assert reply.completions[1][0].token_ids == [5, 1]


_PASSING = {
  "reset": Fault("reset"),
  "truncated": Fault("truncate"),
  "lost after it was done": Fault("lose"),
  "not JSON": Fault("garbage", b"<html>"),
  "JSON of another kind": Fault("garbage", b'{"message": "hi"}'),
  "502": Fault("status", 502),
  "503": Fault("status", 503),
  "busy": Fault("busy", 0),
  "short logprobs": _set("logprobs", [-0.5]),
  "null logprob": _set("logprobs", [-0.5, None]),
  "NaN logprob": _set("logprobs", [-0.5, float("nan")]),
  "infinite logprob": _set("logprobs", [-0.5, float("-inf")]),
  "positive logprob": _set("logprobs", [-0.5, 0.1]),
  "NaN model logprob": _set("model_logprobs", [float("nan"), -1.0]),
  "too many tokens": _set("token_ids", [1] * 5),
  "negative token": _set("token_ids", [1, -1]),
  "unknown field": _set("txt", "hi"),
  "another request": Fault("edit", lambda r: r.update(request_id="r0")),
  "a prompt too few": Fault("edit", lambda r: r["completions"].pop()),
  "a completion too few": Fault("edit", lambda r: r["completions"][0].pop()),
}


@pytest.mark.parametrize("fault", _PASSING.values(), ids=_PASSING)
def test_transient_failures_are_retried_with_the_same_id(server, fault):
  server.script["/generate"] = [fault, fault]
  assert _call(server, "generate", _request()).completions
  ids = [body["request_id"] for _, body in server.requests]
  assert ids == ["r1"] * 3


@pytest.mark.parametrize("fault", _PASSING.values(), ids=_PASSING)
def test_persistent_failures_raise(server, fault):
  server.script["/generate"] = [fault] * 10_000
  with pytest.raises(client.UnavailableError) as caught:
    _call(server, "generate", _request())
  assert caught.value.exit_code == errors.Exit.ROLLOUT
  assert server.url in caught.value.where
  if fault.kind != "busy":
    assert len(server.requests) == 3


def test_a_lost_response_is_not_generated_again(server):
  server.script["/generate"] = [Fault("lose"), Fault("truncate")]
  _call(server, "generate", _request(request_id="once"))
  assert len(server.requests) == 3
  assert server.num_generated == 1


@pytest.mark.parametrize("fault", [Fault("hang"), Fault("drip", 0.05)])
def test_deadlines_are_wall_clock_time(server, fault):
  server.script["/generate"] = [fault]
  start = time.monotonic()
  with pytest.raises(client.UnavailableError, match="within 1 s"):
    _call(server, "generate", _request())
  assert time.monotonic() - start < 2.0


def test_retry_after_is_respected(server):
  server.script["/generate"] = [Fault("busy", 0.5)]
  with stamina.set_testing(False):
    start = time.monotonic()
    _call(server, "generate", _request())
  assert 0.5 <= time.monotonic() - start < 1.0


def test_a_rejection_raises_without_a_retry(server):
  server.script["/generate"] = [Fault("status", 422)]
  with pytest.raises(client.RefusedError, match="Because") as caught:
    _call(server, "generate", _request())
  assert caught.value.status == 422
  assert len(server.requests) == 1


def test_an_internal_server_error_is_not_retried(server):
  server.script["/generate"] = [Fault("status", 500)]
  with pytest.raises(client.UnavailableError, match="500"):
    _call(server, "generate", _request())
  assert len(server.requests) == 1


def test_completions_of_another_version_are_rejected(server):
  stale = Fault("edit", lambda reply: reply.update(version=7))
  server.script["/generate"] = [stale]
  with pytest.raises(client.UnavailableError, match="response has version 7"):
    _call(server, "generate", _request(version=server.version))


def test_a_push_is_not_retried(server):
  push = wire.UpdateRequest(trainer_id="t", version=1, digest="d")
  server.script["/update_weights"] = [Fault("lose")]
  with pytest.raises(client.UnavailableError):
    _call(server, "update_weights", push)
  assert server.paths() == ["/update_weights"]
  assert _call(server, "version") == wire.Version(version=1, digest="d")


def test_a_hung_engine_is_unavailable(server):
  server.status = "hung"
  try:
    with pytest.raises(client.UnavailableError, match="engine is hung"):
      _call(server, "health")
  finally:
    server.status = "ok"
  assert server.paths() == ["/health"]


def test_a_missing_server_is_unavailable():
  class Nowhere:
    url = "http://127.0.0.1:9"

  with pytest.raises(client.UnavailableError, match="ConnectError"):
    _call(Nowhere, "health")


def test_errors_contain_no_sampled_text(server):
  server.script["/generate"] = [_set("finish_reason", "secret words")] * 3
  with pytest.raises(client.UnavailableError) as caught:
    _call(server, "generate", _request())
  assert "finish_reason" in str(caught.value)
  assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
  "url", ["127.0.0.1:80", "ftp://host", "http://", "http://host:x"]
)
def test_an_invalid_address_is_a_config_error(url):
  with pytest.raises(errors.ConfigError, match="address"):
    client.Client(url, deadlines=_DEADLINES, token=None)


def test_the_client_needs_no_jax():
  code = "import sys, rollout.remote.client; sys.exit('jax' in sys.modules)"
  root = pathlib.Path(__file__).parents[3]
  assert not subprocess.run([sys.executable, "-c", code], cwd=root).returncode
