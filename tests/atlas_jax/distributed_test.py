# SPDX-License-Identifier: Apache-2.0
"""Tests connecting processes and comparing their facts."""

from concurrent import futures
import socket
import time

import jax
import pytest

from atlas_jax import distributed, errors


@pytest.fixture
def coordinator():
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return f"127.0.0.1:{probe.getsockname()[1]}"


def _wait_for_all(coordinator, num_processes, process_id, *, seconds):
  address = distributed.Address(coordinator, num_processes, process_id)
  distributed._wait_for_all(address, deadline=time.monotonic() + seconds)


def test_connected_processes_continue(coordinator):
  with futures.ThreadPoolExecutor(3) as pool:
    calls = [
      pool.submit(_wait_for_all, coordinator, 3, i, seconds=30)
      for i in (2, 1, 0)
    ]
    for call in calls:
      call.result()
  # JAX can now use the address.
  host, port = coordinator.split(":")
  socket.create_server((host, int(port))).close()


def test_missing_processes_are_listed(coordinator):
  with futures.ThreadPoolExecutor(2) as pool:
    calls = [
      pool.submit(_wait_for_all, coordinator, 4, i, seconds=1) for i in (2, 0)
    ]
    errors_ = [call.exception() for call in calls]
  assert "Missing processes: 1, 3." in str(errors_[1])
  assert "Process 0 was unreachable, or timed out" in str(errors_[0])
  assert {error.exit_code for error in errors_} == {8}


@pytest.mark.parametrize(
  "address", [("host", 2, 0), ("host:1", 2, 2), (":1", 1, 0), ("host:x", 1, 0)]
)
def test_invalid_addresses_are_rejected(address):
  with pytest.raises(errors.ConfigError, match="must be HOST:PORT"):
    distributed.initialize(
      distributed.Address(*address), max_wait_s=1, max_silence_s=10
    )


def test_an_address_of_another_machine_is_rejected():
  with pytest.raises(errors.ConfigError, match="Process 0 cannot listen"):
    _wait_for_all("192.0.2.1:9", 2, 0, seconds=1)


@pytest.mark.parametrize(
  ("coordinator", "bound"),
  [
    ("127.0.0.1:9", "127.0.0.1:9"),
    ("localhost:9", "localhost:9"),
    ("[::1]:9", "[::1]:9"),
    ("10.0.0.1:9", None),
    ("node1:9", None),
  ],
)
def test_a_local_coordinator_listens_on_loopback(
  monkeypatch, coordinator, bound
):
  given = {}
  monkeypatch.setattr(jax.distributed, "initialize", given.update)
  monkeypatch.setattr(distributed, "_wait_for_all", lambda *_, **__: None)
  distributed.initialize(
    distributed.Address(coordinator, 2, 0), max_wait_s=1, max_silence_s=10
  )
  assert given["coordinator_bind_address"] == bound
  assert given["coordinator_address"] == coordinator


@pytest.mark.parametrize(
  ("environ", "several"),
  [
    ({}, False),
    ({"SLURM_JOB_ID": "3", "SLURM_NTASKS": "8"}, False),  # Without srun.
    ({"SLURM_STEP_NUM_TASKS": "1"}, False),
    ({"SLURM_STEP_NUM_TASKS": "8"}, True),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ({"MEGASCALE_COORDINATOR_ADDRESS": "a"}, True),
  ],
)
def test_cluster_jobs_are_detected(environ, several):
  assert distributed.is_cluster_job(environ) == several


def test_differences_between_processes_are_listed_by_value():
  facts = [{"seed": "1", "lr": "2"}, {"seed": "1"}, {"seed": "3", "lr": "2"}]
  assert distributed._differences(facts) == [
    "lr: 2 (process 0, 2); none (process 1)",
    "seed: 1 (process 0, 1); 3 (process 2)",
  ]
  assert not distributed._differences(facts[:1] * 3)


def test_a_single_process_does_not_wait():
  distributed.agree({"seed": "1"})
  distributed.wait("here")
  from_first = distributed.FirstProcessBroadcast("test")
  assert from_first(lambda: {"a": [1]}) == {"a": [1]}
  assert distributed.is_first()
  assert jax.process_count() == 1
