# SPDX-License-Identifier: Apache-2.0
"""Tests that a failing function affects only one call."""

import subprocess
import sys
import time

import pytest

from atlas_jax import errors
from atlas_jax.rewards import isolated

_ECHO = "tests.reward_functions:echo"
_LIMITS = isolated.Limits(timeout_s=0.5, max_memory_bytes=2 << 30)


@pytest.fixture(scope="module")
def worker():
  with isolated.Worker(_ECHO, "json", _LIMITS) as worker:
    yield worker


@pytest.mark.parametrize(
  ("argument", "failure"),
  [
    ("raise", "raised KeyError"),
    ("hang", "took more than 0.5 s"),
    ("leave children", "took more than 0.5 s"),
    ("exit", "process exited"),
    ("eat", "raised MemoryError"),
  ],
)
def test_a_failure_is_returned_and_the_next_call_works(
  worker, argument, failure
):
  assert worker.ask(argument) == isolated.Answer(failure=failure)
  assert worker.ask([1, "a\nb"]).value == [1, "a\nb"]


def test_printed_output_is_not_an_answer(worker):
  assert worker.ask("print").value == "print"


def test_a_large_argument_and_answer_pass(worker):
  assert worker.ask("x" * 10**6).value == "x" * 10**6


@pytest.mark.parametrize(
  "target",
  ["tests.reward_functions:none", "no.such.module:f", "os", "os:sep"],
)
def test_invalid_targets_are_rejected(target):
  worker = isolated.Worker(target, "json", _LIMITS)
  with pytest.raises(errors.ConfigError, match="Failed to start"), worker:
    pass


def _num_alive(group):
  listed = subprocess.run(
    ["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True
  )
  rows = [line.split() for line in listed.stdout.splitlines()]
  # Z is a zombie: exited, but not waited for.
  return sum(g == str(group) and not stat.startswith("Z") for g, stat in rows)


def test_children_are_killed_with_their_worker():
  with isolated.Worker(_ECHO, "json", _LIMITS) as worker:
    group = worker._process.pid
    assert _num_alive(group) == 1
    assert worker.ask("leave children").failure
    assert _num_alive(group) == 0


def test_a_pool_runs_in_parallel_and_keeps_the_order():
  limits = isolated.Limits(timeout_s=20.0, max_memory_bytes=0)
  target = "tests.reward_functions:pid"
  with isolated.Pool(target, limits, num_workers=2) as pool:
    assert len({answer.value for answer in pool.map([0.2] * 4)}) == 2
  with isolated.Pool(_ECHO, limits, num_workers=2) as pool:
    answers = pool.map(["a", "raise", "b", "exit", "c"])
  assert [answer.value for answer in answers] == ["a", None, "b", None, "c"]


def test_a_hanging_worker_exits_with_its_parent():
  parent = subprocess.Popen(
    [
      sys.executable,
      "-c",
      "from atlas_jax.rewards import isolated\n"
      f"with isolated.Worker({_ECHO!r}, 'json', isolated.Limits(60, 0)) as w:\n"
      "  print(w._process.pid, flush=True)\n"
      "  w.ask('hang')\n",
    ],
    stdout=subprocess.PIPE,
    text=True,
  )
  with parent:
    pid = int(parent.stdout.readline())
    time.sleep(0.2)
    parent.kill()
  deadline = time.monotonic() + 20
  while _num_alive(pid) and time.monotonic() < deadline:
    time.sleep(0.05)
  assert _num_alive(pid) == 0


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("inf"), float("nan")])
def test_a_call_must_have_a_deadline(timeout_s):
  with pytest.raises(ValueError, match="timeout_s"):
    isolated.Limits(timeout_s, 0)
