# SPDX-License-Identifier: Apache-2.0
"""Assigns devices, ports and roles to servers, and builds their commands."""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
import subprocess
import sys

from atlas_jax import errors
from rollout import addresses, supervisor, wire

# Fraction of a GPU's memory for engines, alone or shared with training.
_ENGINE_FRACTION = 0.9
_SHARED_FRACTION = 0.45


@dataclasses.dataclass(frozen=True)
class Site:
  """Addresses and launch settings of the servers."""

  host: str
  port: int
  engine: wire.Engine
  python: str
  models: Mapping[wire.Role, str]
  dtype: str
  logs: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Split:
  """Environment variables that assign devices to each process.

  `fractions` are the fractions of GPU memory for each server; 0 on a CPU.
  """

  servers: tuple[Mapping[str, str], ...]
  fractions: tuple[float, ...]
  training: Mapping[str, str]


def find_gpus(environ: Mapping[str, str]) -> tuple[str, ...]:
  """Returns the ids of the NVIDIA GPUs visible to this process, if any.

  Raises:
    errors.ConfigError: on a TPU, which the launchers do not support.
  """
  platform = environ.get("JAX_PLATFORMS", "")
  if platform.startswith("tpu") or pathlib.Path("/dev/accel0").exists():
    raise errors.ConfigError(
      "The launchers do not support TPUs.",
      where=f"JAX_PLATFORMS={platform}",
      why="A TPU cannot be shared by several processes.",
      fix="Run python -m scripts.train_grpo, which samples in process.",
    )
  if platform.startswith("cpu"):
    return ()
  if "CUDA_VISIBLE_DEVICES" in environ:
    return tuple(
      id_ for id_ in environ["CUDA_VISIBLE_DEVICES"].split(",") if id_
    )
  try:
    listed = subprocess.run(
      ["nvidia-smi", "--list-gpus"], capture_output=True, timeout=60, check=True
    )
  except (OSError, subprocess.SubprocessError):
    return ()
  return tuple(str(i) for i in range(len(listed.stdout.splitlines())))


def split(
  gpus: Sequence[str],
  num_server_devices: int,
  num_training_devices: int,
  *,
  num_roles: int,
  xla_flags: str,
) -> Split:
  """Assigns devices to servers and training.

  Args:
    gpus: as returned by `find_gpus`.
    num_server_devices: 0 for no servers.
    num_training_devices: at least 1.
    num_roles: number of models to serve; each needs at least one server.
    xla_flags: of this process; extended on a CPU.

  Raises:
    errors.ConfigError: if there are too few GPUs.
  """
  num_servers = max(num_server_devices, num_roles * bool(num_server_devices))
  if not gpus:
    return _split_cpu(num_servers, num_training_devices, xla_flags)
  return _split_gpus(
    gpus, num_servers, num_server_devices, num_training_devices
  )


def _split_cpu(
  num_servers: int, num_training_devices: int, xla_flags: str
) -> Split:
  """Simulates one device per server, and all those of training."""
  one, many = (
    {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": f"{xla_flags} "
      f"--xla_force_host_platform_device_count={count}",
    }
    for count in (1, num_training_devices)
  )
  return Split((one,) * num_servers, (0.0,) * num_servers, many)


def _split_gpus(
  gpus: Sequence[str],
  num_servers: int,
  num_server_devices: int,
  num_training_devices: int,
) -> Split:
  """Assigns the first GPUs to servers, one each, and the next to training.

  Servers share a GPU if there is only one for them; with a single GPU in total,
  training shares it as well.
  """
  needed = num_server_devices + num_training_devices
  shared = len(gpus) == num_server_devices == num_training_devices == 1
  if len(gpus) < needed and not shared:
    raise errors.ConfigError(
      f"{needed} GPUs requested, but only {len(gpus)} are visible.",
      where=f"{num_server_devices} to serve, {num_training_devices} to train",
      why=f"The visible GPUs are {', '.join(gpus)}.",
      fix="Request fewer, or set CUDA_VISIBLE_DEVICES.",
    )
  fraction = _SHARED_FRACTION if shared else _ENGINE_FRACTION
  training = {"CUDA_VISIBLE_DEVICES": ",".join(gpus[num_server_devices:needed])}
  if shared:
    training = {
      "CUDA_VISIBLE_DEVICES": gpus[0],
      "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{_SHARED_FRACTION:.3f}",
    }
  if num_server_devices == 1:
    fraction /= num_servers
  servers = tuple(
    {
      "CUDA_VISIBLE_DEVICES": gpus[min(i, num_server_devices - 1)],
      "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{fraction:.3f}",
    }
    for i in range(num_servers)
  )
  return Split(servers, (fraction,) * num_servers, training)


def mesh(num_devices: int) -> dict[str, int]:
  """Returns a mesh; `fsdp` is the largest power of two dividing num_devices.

  Model widths are divisible by powers of two, but seldom by three.
  """
  fsdp = num_devices & -num_devices
  return {"data": num_devices // fsdp, "fsdp": fsdp}


def plan(site: Site, devices: Split) -> list[supervisor.Server]:
  """Returns the servers, with alternating roles, and their commands."""
  roles, servers = tuple(site.models), []
  for i, (env, fraction) in enumerate(
    zip(devices.servers, devices.fractions, strict=True)
  ):
    role, port = roles[i % len(roles)], site.port + i
    argv = [site.python, "-m", "scripts.serve", f"--engine={site.engine}"]
    argv += [f"--model={site.models[role]}", f"--role={role}"]
    argv += [f"--host={site.host}", f"--port={port}"]
    argv += [f"--dtype={site.dtype}"]
    if site.engine == "vllm" and fraction:
      argv.append(f"--gpu_memory_utilization={fraction:.3f}")
    elif site.engine == "vllm":
      # On a CPU vLLM would reserve most memory, and compile for minutes.
      argv += ["--kv_cache_gib=1", "--enforce_eager"]
    name = f"{role} server on port {port}"
    log = site.logs / f"{role}-{port}.log"
    command = supervisor.Command(
      name, tuple(argv), env, log, supervisor.SERVER_GRACE_S
    )
    servers.append(
      supervisor.Server(role, addresses.url(site.host, port), command)
    )
  return servers


def find_engine(root: pathlib.Path, wanted: str) -> tuple[wire.Engine, str]:
  """Returns the engine and its Python; by default vLLM if it is installed.

  Raises:
    errors.ConfigError: if the engine is unknown or not installed.
  """
  python = root / ".venv-rollout/bin/python"
  if wanted not in ("", "vllm", "jax"):
    raise errors.ConfigError(
      f"Unknown rollout engine {wanted!r}.",
      where="--rollout",
      why="The engines are vllm and jax.",
      fix="Use one of them, or omit the flag: vllm is used if installed.",
    )
  if wanted == "vllm" and not python.exists():
    raise errors.ConfigError(
      "vLLM is not installed.",
      where=str(python),
      why="The rollout environment does not exist.",
      fix="Run bash scripts/install_rollout.sh, or set --rollout=jax.",
    )
  if wanted != "jax" and python.exists():
    return "vllm", str(python)
  return "jax", sys.executable
