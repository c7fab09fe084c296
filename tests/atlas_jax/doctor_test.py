# SPDX-License-Identifier: Apache-2.0
"""Tests the checks of the machine and its packages."""

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


def test_this_machine_passes_all_checks():
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


def test_a_failed_check_exits_with_two(monkeypatch, capsys):
  line = doctor.Line("FAIL", "jax", "not installed", "Install it.")
  monkeypatch.setattr(doctor, "diagnose", lambda: iter([line]))
  assert doctor.main() == 2
  assert "Install it." in capsys.readouterr().out


@pytest.mark.parametrize(("word", "code"), [("--help", 0), ("--helpme", 2)])
def test_words_print_the_usage(word, code, capsys):
  assert doctor.main([word]) == code
  assert "python -m atlas_jax.doctor" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("python", "jax", "status"),
  [
    ((3, 12), "0.12", "ok"),
    ((3, 12), "0.12.0.1", "ok"),
    ((3, 11), "0.10.2", "ok"),
    ((3, 12), "0.10.2", "warn"),
    ((3, 11), "0.10.20", "warn"),
    ((3, 13), "0.12.0.1", "warn"),
    ((3, 10), "0.10.2", "FAIL"),
    ((3, 12), None, "warn"),
  ],
)
def test_python_and_jax_must_be_a_supported_pair(python, jax, status):
  line = doctor.check_python(python, jax)
  assert line.status == status
  version = ".".join(map(str, python))
  assert f"{version} with jax {jax or 'not installed'}, " in line.found
  assert ("Python 3.11 with jax 0.10.2" in line.fix) == (status != "ok")


@pytest.mark.parametrize("python", [(3, 11), (3, 12)])
def test_tested_versions_have_no_warning(python):
  versions = doctor._TESTED[python]
  assert set(_status(doctor.check_versions(python, versions)).values()) == {
    "ok"
  }
  assert doctor.check_python(python, versions["jax"]).status == "ok"


def test_missing_old_and_newer_packages_are_reported():
  python = (3, 12)
  changed = {"jax": "0.9.1", "jaxlib": "0.10.2", "optax": "0.3.0.dev1"}
  versions = {**doctor._TESTED[python], **changed}
  del versions["flax"]
  status = _status(doctor.check_versions(python, versions))
  assert status.pop("jax") == status.pop("flax") == "FAIL"
  assert status.pop("jaxlib") == status.pop("optax") == "warn"
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
def test_known_defects_of_versions_are_reported(versions, expected):
  assert _status(doctor.check_version_pairs(versions)) == expected


@pytest.mark.parametrize(
  ("program", "status", "found"),
  [
    ("print('8|gpu|NVIDIA H100')", "ok", "8 of NVIDIA H100 (gpu)"),
    ("print('1|cpu|cpu')", "FAIL", "exists"),
    ("raise ImportError('no flax')", "FAIL", "no flax"),
    ("import time; time.sleep(60)", "FAIL", "within 0.5 s"),
  ],
)
def test_devices_are_listed_in_a_child_process(
  monkeypatch, tmp_path, program, status, found
):
  monkeypatch.delenv("JAX_PLATFORMS")
  monkeypatch.setattr(doctor, "_LIST_DEVICES", program)
  monkeypatch.setattr(doctor, "_ACCELERATORS", (str(tmp_path),))
  if "sleep" in program:
    monkeypatch.setattr(doctor, "_START_S", 0.5)
  line = doctor.check_devices()
  assert line.status == status
  assert found in line.found


_KNOWN_FLAG = "--xla_force_host_platform_device_count=2"


@pytest.mark.parametrize(
  ("flags", "status", "found"),
  [
    (_KNOWN_FLAG, "ok", _KNOWN_FLAG),
    (f"{_KNOWN_FLAG} --xla_unknown=1", "FAIL", "XLA_FLAGS: --xla_unknown=1"),
    ("--xla_gpu_ftz=maybe", "FAIL", "xla_gpu_ftz"),
  ],
)
def test_xla_flags_are_parsed_by_the_installed_xla(flags, status, found):
  line = doctor.check_xla_flags(flags)
  assert line.status == status
  assert found in line.found
  assert "\n" not in line.found


def test_xla_that_does_not_start_is_reported(monkeypatch):
  monkeypatch.setattr(doctor, "_START_XLA", "import time; time.sleep(60)")
  monkeypatch.setattr(doctor, "_START_S", 0.5)
  line = doctor.check_xla_flags("--xla_any=1")
  assert line.status == "FAIL"
  assert "within 0.5 s" in line.found


def test_a_port_in_use_is_reported():
  with socket.socket() as server:
    server.bind(("127.0.0.1", 0))
    server.listen()
    port = server.getsockname()[1]
    assert doctor.check_port(port).status == "warn"
  assert doctor.check_port(port).status == "ok"


def test_low_resources_are_reported_with_a_fix(tmp_path):
  assert doctor.check_space("disk", tmp_path, low=0).status == "ok"
  short = doctor.check_space("shared memory", tmp_path, low=1 << 60)
  assert short.status == "warn"
  assert "--shm-size" in short.fix
  assert doctor.check_space("disk", tmp_path / "gone", low=0).status == "warn"
  assert doctor.check_memory(7 * _GIB).status == "warn"
  assert doctor.check_memory(64 * _GIB).status == "ok"
  assert doctor.check_cores(1).status == "warn"


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
def test_the_memory_limit_of_a_container_is_used(tmp_path, name):
  whole = doctor.memory_limit(tmp_path)
  path = tmp_path / name
  path.parent.mkdir(exist_ok=True)
  path.write_text("max\n")
  assert doctor.memory_limit(tmp_path) == whole
  path.write_text(f"{_GIB}\n")
  assert doctor.memory_limit(tmp_path) == _GIB
