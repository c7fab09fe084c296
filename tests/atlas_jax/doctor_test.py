# SPDX-License-Identifier: Apache-2.0
"""A machine that is fit is told apart from one that is not."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

from atlas_jax import doctor

_ROOT = pathlib.Path(__file__).parents[2]
_GIB = 2**30


def _status(lines):
  return {line.name: line.status for line in lines}


def test_this_machine_is_fit_to_run_the_tests():
  done = subprocess.run(
    [sys.executable, "-m", "atlas_jax.doctor"],
    cwd=_ROOT,
    env={**os.environ, "XLA_FLAGS": ""},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  lines = [line.split() for line in done.stdout.splitlines() if line[0] != " "]
  assert {line[0] for line in lines} <= {"ok", "warn"}
  names = {line[1] for line in lines}
  assert {"python", "jax", "flax", "devices", "disk", "cores"} <= names


def test_a_line_that_fails_ends_with_two(monkeypatch, capsys):
  line = doctor.Line("FAIL", "jax", "not installed", "Install it.")
  monkeypatch.setattr(doctor, "diagnose", lambda: iter([line]))
  assert doctor.main() == 2
  assert "Install it." in capsys.readouterr().out


@pytest.mark.parametrize(
  ("version", "status"),
  [((3, 10), "FAIL"), ((3, 11), "ok"), ((3, 12), "ok"), ((3, 13), "warn")],
)
def test_python_is_new_enough(version, status):
  assert doctor.of_python(version).status == status


def test_a_package_is_missing_old_or_newer_than_tested():
  versions = {**doctor._TESTED, "jax": "0.9.1", "optax": "0.3.0.dev1"}
  del versions["flax"]
  status = _status(doctor.of_versions(versions))
  assert status.pop("jax") == status.pop("flax") == "FAIL"
  assert status.pop("optax") == "warn"
  assert set(status.values()) == {"ok"}


@pytest.mark.parametrize(
  ("versions", "expected"),
  [
    ({}, {}),
    ({"jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8"}, {}),
    ({"jax": "0.11.1", "flax": "0.12.8"}, {"jax with flax": "warn"}),
    ({"jax": "0.12.0.1", "flax": "0.13.0"}, {}),
    ({"jax": "0.10.2", "jaxlib": "0.10.1"}, {"jax with jaxlib": "FAIL"}),
    (
      {"jaxlib": "0.10.2", "jax-cuda13-plugin": "0.10.1"},
      {"jax-cuda13-plugin with jaxlib": "FAIL"},
    ),
    ({"safetensors": "0.8.0"}, {"safetensors": "warn"}),
    ({"safetensors": "0.7.0"}, {}),
    ({"latex2sympy2": "1.9.1"}, {"latex2sympy2": "warn"}),
    ({"vllm": "0.31.2"}, {"vllm": "FAIL"}),
    ({"vllm": "0.32.0"}, {}),
    (
      {"jax-cuda12-plugin": "0.10.2", "torch": "2.13.0"},
      {"jax with torch": "warn"},
    ),
  ],
)
def test_versions_that_go_wrong_together_are_known(versions, expected):
  assert _status(doctor.check_version_pairs(versions)) == expected


@pytest.mark.parametrize(
  ("program", "status", "found"),
  [
    ("print('8|gpu|NVIDIA H100')", "ok", "8 of NVIDIA H100 (gpu)"),
    ("print('1|cpu|cpu')", "FAIL", "yet there is"),
    ("raise ImportError('no flax')", "FAIL", "no flax"),
    ("import time; time.sleep(60)", "FAIL", "within 0.5 s"),
  ],
)
def test_devices_are_asked_for_from_outside(
  monkeypatch, tmp_path, program, status, found
):
  monkeypatch.delenv("JAX_PLATFORMS")
  monkeypatch.setattr(doctor, "_LIST_DEVICES", program)
  monkeypatch.setattr(doctor, "_ACCELERATORS", (str(tmp_path),))
  if "sleep" in program:
    monkeypatch.setattr(doctor, "_DEVICES_S", 0.5)
  line = doctor.of_devices()
  assert line.status == status
  assert found in line.found


def test_a_port_that_is_taken_is_told():
  with socket.socket() as server:
    server.bind(("127.0.0.1", 0))
    server.listen()
    port = server.getsockname()[1]
    assert doctor.of_port(port).status == "warn"
  assert doctor.of_port(port).status == "ok"


def test_what_is_short_is_told_with_a_way_out(tmp_path):
  assert doctor.of_space("disk", tmp_path, low=0).status == "ok"
  short = doctor.of_space("shared memory", tmp_path, low=1 << 60)
  assert short.status == "warn"
  assert "--shm-size" in short.fix
  assert doctor.of_space("disk", tmp_path / "gone", low=0).status == "warn"
  assert doctor.of_memory(7 * _GIB).status == "warn"
  assert doctor.of_memory(64 * _GIB).status == "ok"
  assert doctor.of_cores(1).status == "warn"


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
def test_the_limit_of_a_container_counts(tmp_path, name):
  whole = doctor.memory_limit(tmp_path)
  path = tmp_path / name
  path.parent.mkdir(exist_ok=True)
  path.write_text("max\n")
  assert doctor.memory_limit(tmp_path) == whole
  path.write_text(f"{_GIB}\n")
  assert doctor.memory_limit(tmp_path) == _GIB
