# SPDX-License-Identifier: Apache-2.0
"""Sampling continues, or stops with a reason, under every server fault."""

import collections
import dataclasses
import threading
import time

import pytest
import stamina

from atlas_jax import errors, types
from rollout.remote import client, fleet, http_sampler
from tests import fault_server

Fault = fault_server.Fault
_TOKENIZER = "t" * 64
_DEADLINES = client.Deadlines(generate_s=2.0, update_s=2.0, control_s=1.0)
_PARAMS = types.SamplingParams(
  group_size=2,
  max_completion_tokens=4,
  temperature=1.0,
  top_p=1.0,
  top_k=0,
  seed=0,
)


@pytest.fixture
def servers():
  pair = [fault_server.FaultServer(), fault_server.FaultServer()]
  yield pair
  for server in pair:
    server.close()


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
  monkeypatch.setattr(fleet, "_PROBE_S", 0.05)
  with stamina.set_testing(True, attempts=100):
    yield


def _channel(role="policy", wait_s=2.0, heartbeat_s=20.0):
  return fleet.ChannelTerms(
    role=role,
    tensors={"w": (2, 3)},
    tokenizer_digest=_TOKENIZER,
    weights_root="/dev/shm",
    heartbeat_s=heartbeat_s,
    wait_s=wait_s,
  )


def _open(*servers, version=0, max_rows=4, generate_s=2.0, **channel):
  channel = _channel(**channel)
  is_policy = channel.role == "policy"
  sampler = http_sampler.HttpSampler(
    [server.url for server in servers],
    channel=channel,
    deadlines=dataclasses.replace(_DEADLINES, generate_s=generate_s),
    token=None,
    publish=(lambda _, version: f"d{version}") if is_policy else None,
    max_rows=max_rows,
  )
  if is_policy and version is not None:
    sampler.update_weights({}, version)
  return sampler


def _prompts(count):
  return [
    types.Prompt(row_id=f"row{i}", text="", token_ids=(i + 1, 9))
    for i in range(count)
  ]


def test_requests_have_no_more_tokens_than_servers_accept(monkeypatch):
  monkeypatch.setattr(http_sampler, "_MAX_TOKENS", 10)
  lengths = (4, 6, 1, 9, 11, 2, 2, 2, 2)
  prompts = [
    types.Prompt(row_id=str(i), text="", token_ids=(1,) * n)
    for i, n in enumerate(lengths)
  ]
  parts = http_sampler._split(prompts, 3)
  assert [[len(p.token_ids) for p in part] for part in parts] == [
    [4, 6],
    [1, 9],
    [11],  # Alone; the server decides.
    [2, 2, 2],
    [2],
  ]
  assert [p for part in parts for p in part] == prompts
  assert http_sampler._split([], 0) == []


def _check(completions, count, version):
  assert [len(group) for group in completions] == [2] * count
  for i, group in enumerate(completions):
    for completion in group:
      assert completion.token_ids == (i + 1, version + 1)
      assert completion.version == version


def test_completions_are_in_prompt_order_from_all_servers(servers):
  with _open(*servers, version=3) as sampler:
    _check(sampler.sample(_prompts(20), _PARAMS), 20, 3)
    assert sampler.version == 3
  assert all(server.num_generated == 5 for server in servers)


def test_the_server_with_fewer_outstanding_tokens_gets_more(servers):
  servers[0].script["/generate"] = [Fault("drip", 0.003)] * 100
  with _open(*servers) as sampler:
    sampler.sample(_prompts(80), _PARAMS)
  slow, fast = (server.num_generated for server in servers)
  assert fast > 2 * slow


@pytest.mark.parametrize(
  "kind", ["reset", "truncate", "hang", "status", "garbage", "edit"]
)
def test_requests_of_a_failing_server_move_with_their_ids(servers, kind):
  value = {
    "status": 500,
    "garbage": b"?",
    "edit": lambda reply: reply["completions"].clear(),
  }.get(kind)
  servers[0].script["/generate"] = [Fault(kind, value)] * 100
  with _open(*servers, version=1) as sampler:
    _check(sampler.sample(_prompts(8), _PARAMS), 8, 1)
  asked = collections.Counter(
    body["request_id"]
    for server in servers
    for path, body in server.requests
    if path == "/generate" and body["prompts"][0]["row_id"] != "probe"
  )
  assert len(asked) == 4
  assert max(asked.values()) > 1
  assert servers[1].num_generated == 4


def test_a_restarted_server_gets_the_weights_again(servers):
  first, second = servers
  with _open(first, second, version=4) as sampler:
    first.kill()
    _check(sampler.sample(_prompts(8), _PARAMS), 8, 4)
    first.requests.clear()
    first.start()
    _wait(lambda: "/update_weights" in first.paths())
    second.kill()
    _check(sampler.sample(_prompts(8), _PARAMS), 8, 4)
  assert first.paths()[:3] == [
    "/health",
    "/init_communicator",
    "/update_weights",
  ]
  assert first.version == 4


def test_running_requests_move_when_their_server_is_killed(servers):
  first, second = servers
  first.script["/generate"] = [Fault("hang")] * 100
  with _open(first, second, version=4) as sampler:
    threading.Timer(0.3, first.kill).start()
    start = time.monotonic()
    _check(sampler.sample(_prompts(8), _PARAMS), 8, 4)
  assert time.monotonic() - start < _DEADLINES.generate_s
  assert second.num_generated == 4


def test_the_only_server_may_restart_within_the_wait(servers):
  server = servers[0]
  with _open(server, version=2) as sampler:
    server.kill()
    threading.Timer(0.5, server.start).start()
    _check(sampler.sample(_prompts(4), _PARAMS), 4, 2)


def test_requests_of_a_hung_engine_move_before_the_deadline(servers):
  first, second = servers
  first.script["/generate"] = [Fault("hang")] * 100
  start = time.monotonic()
  with _open(first, second, heartbeat_s=0.4) as sampler:
    first.status = "hung"
    _check(sampler.sample(_prompts(8), _PARAMS), 8, 0)
  assert time.monotonic() - start < _DEADLINES.generate_s


def test_an_engine_that_hangs_while_health_is_ok_is_drained(servers):
  first, second = servers
  first.script["/generate"] = [Fault("hang")] * 100
  with _open(first, second) as sampler:
    _check(sampler.sample(_prompts(8), _PARAMS), 8, 0)
    start = time.monotonic()
    for _ in range(3):  # Its health is ok, but it gets no requests.
      _check(sampler.sample(_prompts(8), _PARAMS), 8, 0)
    assert time.monotonic() - start < _DEADLINES.generate_s
    first.kill()
    first.start()
    first.script["/generate"].clear()
    _wait(lambda: sampler._fleet.num_ready == 2)
    _check(sampler.sample(_prompts(8), _PARAMS), 8, 0)
  assert first.num_generated > 0


def test_only_a_slow_request_moves_and_its_server_stays_ready(servers):
  first, second = servers
  first.script["/generate"] = [Fault("hang")]
  first.script["/probe"] = []
  with _open(first, second) as sampler:
    start = time.monotonic()
    _check(sampler.sample(_prompts(16), _PARAMS), 16, 0)
    assert time.monotonic() - start < 3 * _DEADLINES.generate_s
    assert sampler._fleet.num_ready == 2
  assert first.num_generated == 3
  assert second.num_generated == 5


@pytest.mark.parametrize("num_servers", [1, 2])
def test_a_prompt_that_is_slow_everywhere_is_dropped_alone(
  servers, num_servers
):
  for server in servers:
    server.stuck = {"row2"}
  with _open(*servers[:num_servers], generate_s=1.0) as sampler:
    start = time.monotonic()
    groups = sampler.sample(_prompts(8), _PARAMS)
    waited_s = time.monotonic() - start
    assert sampler._fleet.num_ready == num_servers
  assert 3.0 <= waited_s < 4.0
  assert groups.pop(2) == []
  assert [group[0].token_ids[0] for group in groups] == [1, 2, 4, 5, 6, 7, 8]
  assert all(len(group) == 2 for group in groups)


def test_prompts_that_are_all_slow_are_dropped_concurrently(servers):
  servers[0].stuck = {f"row{i}" for i in range(20)}
  with _open(servers[0], generate_s=1.0, max_rows=40) as sampler:
    start = time.monotonic()
    assert sampler.sample(_prompts(20), _PARAMS) == [[]] * 20
    waited_s = time.monotonic() - start
  assert waited_s < 4.0


def test_a_rejection_of_the_last_attempt_raises(servers):
  servers[0].script["/generate"] = [
    Fault("hang"),
    Fault("hang"),
    Fault("status", 422),
    Fault("status", 422),
  ]
  servers[0].script["/probe"] = []
  with (
    _open(servers[0], generate_s=1.0) as sampler,
    pytest.raises(errors.RolloutError, match="rejected"),
  ):
    sampler.sample(_prompts(2), _PARAMS)


def test_without_any_server_the_error_lists_each(servers):
  with _open(*servers, wait_s=0.5) as sampler:
    for server in servers:
      server.kill()
    start = time.monotonic()
    with pytest.raises(
      errors.RolloutError, match="No rollout server"
    ) as caught:
      sampler.sample(_prompts(4), _PARAMS)
    assert time.monotonic() - start < 3.0
  assert caught.value.exit_code == errors.Exit.ROLLOUT
  for server in servers:
    assert server.url in caught.value.where
    assert f"{server.url}: ConnectError" in caught.value.why


def test_the_error_of_a_request_that_fails_everywhere_lists_the_reasons(
  servers,
):
  for server in servers:
    server.script["/generate"] = [Fault("status", 500)] * 1000
    server.script["/probe"] = []
  with (
    _open(*servers, wait_s=30.0) as sampler,
    pytest.raises(errors.RolloutError, match="from row row0") as caught,
  ):
    sampler.sample(_prompts(1), _PARAMS)
  assert "500" in caught.value.why


def test_a_rejected_request_is_not_sent_to_another_server(servers):
  for server in servers:
    server.script["/generate"] = [Fault("status", 422)]
  with (
    _open(*servers) as sampler,
    pytest.raises(client.RefusedError, match="Because"),
  ):
    sampler.sample(_prompts(1), _PARAMS)
  assert sum(s.paths().count("/generate") for s in servers) == 1


def test_a_prompt_that_is_too_long_is_rejected_before_sending(servers):
  servers[1].max_model_len = 10
  long = types.Prompt(row_id="row7", text="", token_ids=(1,) * 7)
  with (
    _open(*servers) as sampler,
    pytest.raises(errors.ConfigError, match="got 7") as caught,
  ):
    sampler.sample([*_prompts(1), long], _PARAMS)
  assert caught.value.where == "row row7"
  assert not any(server.num_generated for server in servers)


def test_sampling_waits_for_a_server_that_starts_late(servers):
  server = servers[0]
  server.kill()
  threading.Timer(0.3, server.start).start()
  with _open(server) as sampler:
    _check(sampler.sample(_prompts(1), _PARAMS), 1, 0)


def test_waiting_is_logged(servers, monkeypatch, caplog):
  monkeypatch.setattr(fleet, "_PROGRESS_S", 0.1)
  servers[0].kill()
  threading.Timer(0.5, servers[0].start).start()
  caplog.set_level("INFO")
  with _open(servers[0]):
    assert f"Waiting for {servers[0].url}, 2 s more: Conn" in caplog.text


def test_the_error_for_a_missing_server_names_the_command_to_start_it(servers):
  servers[0].kill()
  with pytest.raises(errors.RolloutError, match=r"scripts\.serve") as caught:
    _open(servers[0], wait_s=0.3)
  assert servers[0].url in caught.value.where


@pytest.mark.parametrize(
  ("name", "value"), [("role", "student"), ("tokenizer", "u" * 64)]
)
def test_a_server_of_another_role_or_tokenizer_is_rejected_immediately(
  servers, name, value
):
  setattr(servers[0], name, value)
  with pytest.raises(errors.ConfigError, match=f"wrong {name}"):
    _open(servers[0])
  assert "/init_communicator" not in servers[0].paths()


def test_a_rejected_handshake_raises_immediately(servers):
  servers[0].script["/init_communicator"] = [Fault("status", 409)]
  with pytest.raises(client.RefusedError, match="Because"):
    _open(servers[0])


def test_the_channel_is_kept_open_and_then_closed(servers):
  with _open(servers[0], heartbeat_s=0.2):
    _wait(lambda: servers[0].paths().count("/init_communicator") >= 3)
  assert servers[0].paths()[-1] == "/close_communicator"
  ids = {
    body["trainer_id"]
    for path, body in servers[0].requests
    if path == "/init_communicator"
  }
  assert len(ids) == 1


def test_a_student_never_gets_weights(servers):
  servers[0].role = "student"
  with _open(servers[0], role="student") as sampler:
    _check(sampler.sample(_prompts(3), _PARAMS), 3, 0)
    with pytest.raises(RuntimeError, match="never replaced"):
      sampler.update_weights({}, 1)
  assert set(servers[0].paths()) == {"/health", "/generate"}


def test_sampling_from_a_policy_requires_weights(servers):
  with (
    _open(servers[0], version=None) as sampler,
    pytest.raises(RuntimeError, match="Push weights"),
  ):
    sampler.sample(_prompts(1), _PARAMS)


def test_a_push_whose_response_is_lost_is_not_repeated(servers):
  with _open(servers[0]) as sampler:
    servers[0].script["/update_weights"] = [Fault("lose")]
    servers[0].requests.clear()
    sampler.update_weights({}, 5)
    _check(sampler.sample(_prompts(1), _PARAMS), 1, 5)
  assert servers[0].paths().count("/update_weights") == 1


def test_a_push_that_times_out_is_polled_and_not_repeated(servers):
  server = servers[0]
  with _open(server, wait_s=5.0) as sampler:
    server.script["/update_weights"] = [
      Fault("load", _DEADLINES.update_s + 0.5)
    ]
    server.requests.clear()
    sampler.update_weights({}, 5)
    _check(sampler.sample(_prompts(1), _PARAMS), 1, 5)
  paths = server.paths()
  assert paths.count("/update_weights") == 1
  assert paths.count("/init_communicator") > 2  # Each polls the version.


def test_a_server_that_dies_before_it_publishes_gets_the_push_again(servers):
  first, second = servers
  with _open(first, second) as sampler:
    first.script["/update_weights"] = [Fault("die")]
    sampler.update_weights({}, 5)
    _check(sampler.sample(_prompts(8), _PARAMS), 8, 5)
    assert first.num_generated == 0
    first.start()
    _wait(lambda: sampler._fleet.num_ready == 2)
    assert (first.version, first.digest) == (5, "d5")
    _check(sampler.sample(_prompts(8), _PARAMS), 8, 5)
  assert first.num_generated > 0


def test_a_health_check_during_a_push_does_not_drain_the_server(
  servers, caplog
):
  with _open(*servers, heartbeat_s=0.02) as sampler:
    for version in range(1, 30):
      sampler.update_weights({}, version)
  assert "Lost" not in caplog.text


@pytest.mark.parametrize("status", [409, 500])
def test_a_server_that_fails_to_load_is_not_sampled_from(servers, status):
  first, second = servers
  with _open(first, second) as sampler:
    first.script["/update_weights"] = [Fault("status", status)] * 1000
    sampler.update_weights({}, 6)
    _check(sampler.sample(_prompts(8), _PARAMS), 8, 6)
  assert first.num_generated == 0
  assert second.num_generated == 4


def test_a_push_that_all_servers_reject_changes_nothing(servers):
  with _open(*servers, version=2) as sampler:
    for server in servers:
      server.script["/update_weights"] = [Fault("status", 409)] * 100
    with pytest.raises(client.RefusedError):
      sampler.update_weights({}, 3)
    assert sampler.version == 2
    _check(sampler.sample(_prompts(4), _PARAMS), 4, 2)
  assert all(server.version == 2 for server in servers)


def test_a_server_that_loads_a_withdrawn_push_gets_the_last_one(servers):
  first, second = servers
  with _open(first, second, version=2) as sampler:
    # The first server rejects the push, and loads it when it is offered again,
    # while the second server's rejection ends the push.
    first.script["/update_weights"] = [Fault("status", 409), Fault("load", 0.6)]
    second.script["/update_weights"] = [Fault("status", 409, after_s=0.3)]
    with pytest.raises(client.RefusedError):
      sampler.update_weights({}, 3)
    _wait(lambda: first.version == 3)
    _wait(lambda: first.version == 2)
    _check(sampler.sample(_prompts(8), _PARAMS), 8, 2)


def test_a_server_with_other_weights_gets_the_right_ones(servers):
  server = servers[0]
  with _open(server, version=2) as sampler:
    server.version, server.digest = 9, "foreign"
    _check(sampler.sample(_prompts(2), _PARAMS), 2, 2)
  assert server.version == 2


def test_completions_of_every_finish_reason_are_returned(servers):
  def edit(reply):
    stop = {"token_ids": [], "logprobs": [], "finish_reason": "stop"}
    ends = {"token_ids": [2] * 4, "logprobs": [-1.0] * 4}
    reply["completions"] = [
      [{**stop, "model_logprobs": None}],
      [{**ends, "model_logprobs": [-1.0] * 4, "finish_reason": "length"}],
    ]

  servers[0].script["/generate"] = [Fault("edit", edit)]
  params = dataclasses.replace(_PARAMS, group_size=1)
  with _open(servers[0]) as sampler:
    (empty,), (full,) = sampler.sample(_prompts(2), params)
  assert (empty.token_ids, empty.finish_reason) == ((), "stop")
  assert (full.token_ids, full.finish_reason) == ((2,) * 4, "length")


def test_metrics_cover_the_time_since_the_last_call(servers):
  with _open(*servers) as sampler:
    pushed = sampler.take_metrics()
    assert set(pushed) == {"push_s", "publish_s", "drain_s", "load_s"}
    sampler.sample(_prompts(8), _PARAMS)
    sampled = sampler.take_metrics()
    assert set(sampled) == {"tokens_per_s", "queue_s"}
    assert sampled["tokens_per_s"] > 0.0
    assert 0.25 <= sampled["queue_s"] < 0.5  # In the server's queue, and here.
    assert sampler.take_metrics() == {}


def test_threads_can_sample_while_weights_are_pushed(servers):
  with _open(*servers) as sampler:
    results = []

    def sample():
      for _ in range(5):
        results.extend(sampler.sample(_prompts(8), _PARAMS))

    thread = threading.Thread(target=sample)
    thread.start()
    for version in range(1, 6):
      sampler.update_weights({}, version)
    thread.join(30)
  assert len(results) == 40
  for group in results:
    assert {c.token_ids[1] - 1 == c.version for c in group} == {True}


def _wait(is_so, seconds=5.0):
  end = time.monotonic() + seconds
  while not is_so():
    assert time.monotonic() < end, "waited in vain"
    time.sleep(0.02)
