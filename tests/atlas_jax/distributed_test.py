# SPDX-License-Identifier: Apache-2.0
"""Processes that meet, those that do not, and what they differ in."""

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


def _call_roll(coordinator, num_processes, process_id, *, seconds):
  address = distributed.Address(coordinator, num_processes, process_id)
  distributed._call_roll(address, deadline=time.monotonic() + seconds)


def test_all_who_come_go_on(coordinator):
  with futures.ThreadPoolExecutor(3) as pool:
    calls = [
      pool.submit(_call_roll, coordinator, 3, i, seconds=30) for i in (2, 1, 0)
    ]
    for call in calls:
      call.result()
  # The address is free for JAX.
  host, port = coordinator.split(":")
  socket.create_server((host, int(port))).close()


def test_those_who_did_not_come_are_named(coordinator):
  with futures.ThreadPoolExecutor(2) as pool:
    calls = [
      pool.submit(_call_roll, coordinator, 4, i, seconds=1) for i in (2, 0)
    ]
    errors_ = [call.exception() for call in calls]
  assert "These did not come: 1, 3." in str(errors_[1])
  assert "Process 0 was not there, or waited in vain" in str(errors_[0])
  assert {error.exit_code for error in errors_} == {8}


@pytest.mark.parametrize(
  "address", [("host", 2, 0), ("host:1", 2, 2), (":1", 1, 0), ("host:x", 1, 0)]
)
def test_addresses_at_which_nobody_can_meet_are_refused(address):
  with pytest.raises(errors.ConfigError, match="cannot meet"):
    distributed.initialize(
      distributed.Address(*address), max_wait_s=1, max_silence_s=10
    )


def test_an_address_of_another_machine_is_refused():
  with pytest.raises(errors.ConfigError, match="Process 0 cannot be met"):
    _call_roll("192.0.2.1:9", 2, 0, seconds=1)


@pytest.mark.parametrize(
  ("environ", "several"),
  [
    ({}, False),
    ({"SLURM_JOB_ID": "3", "SLURM_NTASKS": "8"}, False),  # Not by srun.
    ({"SLURM_STEP_NUM_TASKS": "1"}, False),
    ({"SLURM_STEP_NUM_TASKS": "8"}, True),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ({"MEGASCALE_COORDINATOR_ADDRESS": "a"}, True),
  ],
)
def test_a_cluster_tells_of_several_processes(environ, several):
  assert distributed.is_told(environ) == several


def test_what_processes_differ_in_is_told_by_value():
  told = [{"seed": "1", "lr": "2"}, {"seed": "1"}, {"seed": "3", "lr": "2"}]
  assert distributed._differences(told) == [
    "lr: 2 (process 0, 2); none (process 1)",
    "seed: 1 (process 0, 1); 3 (process 2)",
  ]
  assert not distributed._differences(told[:1] * 3)


def test_one_process_agrees_with_itself_and_waits_for_nobody():
  distributed.agree({"seed": "1"})
  distributed.wait("here")
  assert distributed.OnFirstProcess("test")(lambda: {"a": [1]}) == {"a": [1]}
  assert distributed.is_first()
  assert jax.process_count() == 1
