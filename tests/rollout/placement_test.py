# SPDX-License-Identifier: Apache-2.0
"""Tests the assignment of devices, ports, roles and memory."""

import pathlib

import pytest

from atlas_jax import errors
from rollout import placement


def _split(num_gpus, num_servers, num_training):
  gpus = [str(i) for i in range(num_gpus)]
  return placement.split(
    gpus, num_servers, num_training, num_roles=2, xla_flags="--a"
  )


@pytest.mark.parametrize(
  ("num_gpus", "num_servers", "num_training", "servers", "training"),
  [
    (2, 1, 1, "00", "1"),
    (4, 1, 3, "00", "1,2,3"),
    (8, 4, 4, "0123", "4,5,6,7"),
    (8, 2, 2, "01", "2,3"),
    (8, 0, 8, "", "0,1,2,3,4,5,6,7"),
    (1, 1, 1, "00", "0"),
  ],
)
def test_gpus_go_to_servers_first_and_are_shared_only_if_necessary(
  num_gpus, num_servers, num_training, servers, training
):
  split = _split(num_gpus, num_servers, num_training)
  given = [env["CUDA_VISIBLE_DEVICES"] for env in split.servers]
  assert given == list(servers)
  assert split.training["CUDA_VISIBLE_DEVICES"] == training
  for gpu in set(servers):
    shares = [
      f for f, s in zip(split.fractions, servers, strict=True) if s == gpu
    ]
    if gpu in training.split(","):
      shares.append(float(split.training["XLA_PYTHON_CLIENT_MEM_FRACTION"]))
    assert sum(shares) == pytest.approx(0.9)


def test_one_role_needs_one_server():
  split = placement.split(["0"], 1, 1, num_roles=1, xla_flags="")
  assert split.fractions == (0.45,)


@pytest.mark.parametrize(("num_gpus", "wanted"), [(1, (1, 2)), (3, (2, 2))])
def test_too_few_gpus_are_an_error(num_gpus, wanted):
  with pytest.raises(errors.ConfigError, match=f"only {num_gpus} are visible"):
    _split(num_gpus, *wanted)


def test_a_cpu_is_shared_and_simulates_the_devices_of_training():
  split = _split(0, 1, 3)
  assert len(split.servers) == 2
  assert split.fractions == (0.0, 0.0)
  flag = "--xla_force_host_platform_device_count="
  assert split.training["XLA_FLAGS"] == f"--a {flag}3"
  assert {env["XLA_FLAGS"] for env in split.servers} == {f"--a {flag}1"}
  envs = (split.training, *split.servers)
  assert {env["JAX_PLATFORMS"] for env in envs} == {"cpu"}


@pytest.mark.parametrize(
  ("environ", "gpus"),
  [
    ({"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "0"}, ()),
    ({"CUDA_VISIBLE_DEVICES": "2,5"}, ("2", "5")),
    ({"CUDA_VISIBLE_DEVICES": ""}, ()),
  ],
)
def test_only_visible_gpus_are_found(environ, gpus):
  assert placement.find_gpus(environ) == gpus


def test_a_tpu_is_rejected():
  with pytest.raises(errors.ConfigError, match="TPUs"):
    placement.find_gpus({"JAX_PLATFORMS": "tpu"})


@pytest.mark.parametrize(
  ("num_devices", "mesh"),
  [(1, (1, 1)), (2, (1, 2)), (3, (3, 1)), (6, (3, 2)), (8, (1, 8))],
)
def test_parameters_are_split_by_powers_of_two(num_devices, mesh):
  assert tuple(placement.mesh(num_devices).values()) == mesh


def _plan(num_gpus, num_servers, engine="vllm", host="127.0.0.1"):
  site = placement.Site(
    host=host,
    port=9000,
    engine=engine,
    python="python",
    models={"policy": "teacher", "student": "pupil"},
    dtype="bfloat16",
    logs=pathlib.Path("logs"),
  )
  return placement.plan(site, _split(num_gpus, num_servers, 1))


def test_roles_alternate_and_ports_are_consecutive():
  servers = _plan(4, 3)
  assert [s.role for s in servers] == ["policy", "student", "policy"]
  assert [s.url[-4:] for s in servers] == ["9000", "9001", "9002"]
  models = ["teacher", "pupil", "teacher"]
  for i, (server, model) in enumerate(zip(servers, models, strict=True)):
    argv = server.command.argv
    assert argv[:3] == ("python", "-m", "scripts.serve")
    assert {
      *("--engine=vllm", f"--model={model}", f"--role={server.role}"),
      *("--host=127.0.0.1", f"--port={9000 + i}", "--dtype=bfloat16"),
      "--gpu_memory_utilization=0.900",
    } <= set(argv)


@pytest.mark.parametrize(
  ("host", "url"),
  [
    ("::1", "http://[::1]:9000"),
    ("localhost", "http://localhost:9000"),
    # Clients on this machine.
    ("::", "http://[::1]:9000"),
    ("0.0.0.0", "http://127.0.0.1:9000"),
  ],
)
def test_urls_of_servers_are_valid(host, url):
  (server, *_) = _plan(0, 1, host=host)
  assert server.url == url
  assert f"--host={host}" in server.command.argv


def test_vllm_on_a_cpu_gets_a_fixed_cache():
  for server in _plan(0, 1):
    assert "--kv_cache_gib=1" in server.command.argv
  for server in _plan(0, 1, engine="jax"):
    assert "--kv_cache_gib=1" not in server.command.argv


def test_vllm_is_the_default_if_installed(tmp_path):
  assert placement.find_engine(tmp_path, "")[0] == "jax"
  with pytest.raises(errors.ConfigError, match="is not installed"):
    placement.find_engine(tmp_path, "vllm")
  python = tmp_path / ".venv-rollout/bin/python"
  python.parent.mkdir(parents=True)
  python.touch()
  assert placement.find_engine(tmp_path, "") == ("vllm", str(python))
  assert placement.find_engine(tmp_path, "jax")[0] == "jax"
  with pytest.raises(errors.ConfigError, match="Unknown rollout engine"):
    placement.find_engine(tmp_path, "sglang")
