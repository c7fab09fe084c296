# SPDX-License-Identifier: Apache-2.0
"""Decides which server runs where: devices, ports, roles, command lines.

Pure functions of what is asked for and of the devices there are.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
import subprocess
import sys

from atlas_jax import errors
from rollout import supervisor, wire

# What engines may take of a GPU together, and when training shares it.
_ENGINE_FRACTION = 0.9
_SHARED_FRACTION = 0.45


@dataclasses.dataclass(frozen=True)
class Site:
  """Where servers are reached, and what they are started with."""

  host: str
  port: int
  engine: wire.Engine
  python: str
  models: Mapping[wire.Role, str]
  dtype: str
  logs: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Split:
  """Environment variables that give each process its devices.

  `fractions` are of one GPU's memory, one for each server; 0 on a CPU.
  """

  servers: tuple[Mapping[str, str], ...]
  fractions: tuple[float, ...]
  training: Mapping[str, str]


def find_gpus(environ: Mapping[str, str]) -> tuple[str, ...]:
  """Lists the NVIDIA GPUs that this process may use; none on a CPU machine.

  Raises:
    errors.ConfigError: on a TPU, which the launchers cannot divide.
  """
  platform = environ.get("JAX_PLATFORMS", "")
  if platform.startswith("tpu") or pathlib.Path("/dev/accel0").exists():
    raise errors.ConfigError(
      "The launchers divide GPUs and CPUs, not TPUs.",
      where=f"JAX_PLATFORMS={platform}",
      why="A TPU belongs to one process.",
      fix="Run python -m scripts.train_grpo; it samples in its own process.",
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
  """Divides the devices between servers and training.

  On GPUs the first go to servers, one each; every role needs one, so with a
  single device two servers may share it. With a single GPU in all, training
  shares it too. On a CPU nothing is divided: JAX simulates the devices of
  training.

  Args:
    gpus: as `find_gpus` lists them.
    num_server_devices: 0 for no servers.
    num_training_devices: at least 1.
    num_roles: how many models are served.
    xla_flags: of this process; on a CPU, more is added to them.

  Raises:
    errors.ConfigError: if there are too few GPUs.
  """
  num_servers = max(num_server_devices, num_roles * bool(num_server_devices))
  if not gpus:
    one, many = (
      {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{xla_flags} "
        f"--xla_force_host_platform_device_count={count}",
      }
      for count in (1, num_training_devices)
    )
    return Split((one,) * num_servers, (0.0,) * num_servers, many)
  needed = num_server_devices + num_training_devices
  shared = len(gpus) == num_server_devices == num_training_devices == 1
  if len(gpus) < needed and not shared:
    raise errors.ConfigError(
      f"{needed} GPUs were asked for, and there are {len(gpus)}.",
      where=f"{num_server_devices} to serve, {num_training_devices} to train",
      why=f"Visible are GPUs {', '.join(gpus)}.",
      fix="Ask for fewer, or set CUDA_VISIBLE_DEVICES.",
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
  """Chooses a mesh: parameters are split by the powers of two in the number.

  Widths of models divide by powers of two, and seldom by three.
  """
  fsdp = num_devices & -num_devices
  return {"data": num_devices // fsdp, "fsdp": fsdp}


def plan(site: Site, devices: Split) -> list[supervisor.Server]:
  """Gives each server its role, by turns, and its command line."""
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
      # On a CPU it would take what memory is left, and compile for minutes.
      argv += ["--kv_cache_gib=1", "--enforce_eager"]
    name = f"{role} server on port {port}"
    log = site.logs / f"{role}-{port}.log"
    command = supervisor.Command(
      name, tuple(argv), env, log, supervisor.SERVER_GRACE_S
    )
    servers.append(
      supervisor.Server(role, f"http://{site.host}:{port}", command)
    )
  return servers


def find_engine(root: pathlib.Path, wanted: str) -> tuple[wire.Engine, str]:
  """Finds the engine, and the Python which has it; `wanted` may be "".

  Raises:
    errors.ConfigError: if it is unknown or not installed.
  """
  python = root / ".venv-rollout/bin/python"
  if wanted not in ("", "vllm", "jax"):
    raise errors.ConfigError(
      f"Unknown rollout engine {wanted!r}.",
      where="--rollout",
      why="There are vllm and jax.",
      fix="Choose one, or leave it out for vllm where it is installed.",
    )
  if wanted == "vllm" and not python.exists():
    raise errors.ConfigError(
      "vLLM is not installed.",
      where=str(python),
      why="The rollout environment was not made yet.",
      fix="Run bash scripts/install_rollout.sh, or set --rollout=jax.",
    )
  if wanted != "jax" and python.exists():
    return "vllm", str(python)
  return "jax", sys.executable
