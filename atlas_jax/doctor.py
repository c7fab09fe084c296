# SPDX-License-Identifier: Apache-2.0
"""Looks at a machine before anything runs on it.

  python -m atlas_jax.doctor

Each line is ok, warn or FAIL, with what to do about it; it ends with 0, or with
2 if a line failed. It needs none of the libraries that it looks for.
"""

from collections.abc import Iterator, Mapping
import dataclasses
from importlib import metadata
import os
import pathlib
import shutil
import socket
import subprocess
import sys
from typing import Literal

from atlas_jax import errors

Status = Literal["ok", "warn", "FAIL"]
Versions = Mapping[str, str]

# What the tests run with, on Python 3.11.
_TESTED = {
  "jax": "0.10.2",
  "jaxlib": "0.10.2",
  "flax": "0.12.8",
  "optax": "0.2.8",
  "orbax-checkpoint": "0.12.8",
  "transformers": "5.23.0",
  "safetensors": "0.8.0",
}
# Seconds for JAX to find its devices: one that another process holds may hang.
_DEVICES_S = 120.0
_LIST_DEVICES = """
import flax.nnx, jax, optax, orbax.checkpoint
devices = jax.devices()
print(len(devices), devices[0].platform, devices[0].device_kind, sep="|")
"""
_ACCELERATORS = ("/dev/nvidia0", "/dev/accel0", "/dev/vfio/0")
# Where rollout servers listen, the first of each role.
_PORTS = (8765, 8766)
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Line:
  """One thing that was looked at; `fix` is empty where it is ok."""

  status: Status
  name: str
  found: str
  fix: str = ""

  def __str__(self) -> str:
    line = f"{self.status:<5} {self.name:<18} {self.found}"
    return f"{line}\n{'':<25}{self.fix}" if self.fix else line


def main() -> int:
  """Prints all lines; returns the exit code."""
  has_failed = False
  for line in diagnose():
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
    has_failed |= line.status == "FAIL"
  return int(errors.Exit.CONFIG if has_failed else errors.Exit.DONE)


def diagnose() -> Iterator[Line]:
  """Yields what there is to say of this machine."""
  versions = installed()
  yield of_python(sys.version_info[:2])
  yield from of_versions(versions)
  yield from check_version_pairs(versions)
  yield of_devices()
  yield from map(of_port, _PORTS)
  yield of_space("disk", pathlib.Path.cwd(), low=50 * _GIB)
  yield of_space("shared memory", pathlib.Path("/dev/shm"), low=_GIB)
  yield of_memory(memory_limit(pathlib.Path("/sys/fs/cgroup")))
  yield of_cores(len(os.sched_getaffinity(0)))


def installed() -> dict[str, str]:
  """Gives the versions of all packages, by their normalised names."""
  return {
    dist.name.lower().replace("_", "-"): dist.version
    for dist in metadata.distributions()
    if dist.name
  }


def of_python(version: tuple[int, ...]) -> Line:
  """Looks at the version of Python."""
  found = ".".join(map(str, version))
  if version < (3, 11):
    return Line("FAIL", "python", found, "Install Python 3.11 or 3.12.")
  if version > (3, 12):
    return Line("warn", "python", found, "Tests run on 3.11 and 3.12.")
  return Line("ok", "python", found)


def of_versions(versions: Versions) -> Iterator[Line]:
  """Looks for the packages that training needs."""
  for name, tested in _TESTED.items():
    found = versions.get(name)
    if found is None:
      fix = "pip install -r requirements/trainer.txt"
      yield Line("FAIL", name, "not installed", fix)
    elif found == tested:
      yield Line("ok", name, found)
    elif _parts(found) < _parts(tested):
      fix = f"pip install '{name}>={tested}'"
      yield Line("FAIL", name, f"{found}, older than {tested}", fix)
    else:
      fix = f"Tests run with {tested}; where something breaks, try that first."
      yield Line("warn", name, found, fix)


def check_version_pairs(versions: Versions) -> Iterator[Line]:
  """Looks for versions that are known to go wrong, alone or together."""
  jax, flax = (_parts(versions.get(name, "")) for name in ("jax", "flax"))
  if jax >= (0, 11, 1) and flax and flax <= (0, 12, 8):
    yield Line(
      "warn",
      "jax with flax",
      f"{versions['jax']} with {versions['flax']}, not yet made for it",
      "Flax names a type that JAX 0.11.1 removed. Where it cannot be imported "
      "(see devices), take a newer Flax, or JAX 0.10.2.",
    )
  jaxlib = versions.get("jaxlib")
  for name in ("jax", "jax-cuda12-plugin", "jax-cuda13-plugin"):
    if jaxlib and name in versions and versions[name] != jaxlib:
      yield Line(
        "FAIL",
        f"{name} with jaxlib",
        f"{versions[name]} with {jaxlib}",
        f"They belong together: pip install '{name}=={jaxlib}'",
      )
  if _parts(versions.get("safetensors", ""))[:2] == (0, 8):
    yield Line(
      "warn",
      "safetensors",
      "0.8 writes wrong bytes of arrays that are not contiguous",
      "atlas_jax does not write with it. In scripts of your own pass arrays "
      "through numpy.ascontiguousarray.",
    )
  if "latex2sympy2" in versions:
    yield Line(
      "warn",
      "latex2sympy2",
      "it pins an old antlr4, which breaks math-verify",
      "pip uninstall latex2sympy2; pip install math-verify[antlr4-13-2]",
    )
  if "vllm" in versions and _parts(versions["vllm"]) < (0, 32):
    yield Line(
      "FAIL",
      "vllm",
      f"{versions['vllm']} has published holes, and other interfaces",
      "pip install 'vllm>=0.32.0'",
    )
  if "jax-cuda12-plugin" in versions and "torch" in versions:
    yield Line(
      "warn",
      "jax with torch",
      "CUDA 12 for JAX beside what torch brings",
      "Keep vLLM in an environment of its own (scripts/install_rollout.sh).",
    )


def of_devices() -> Line:
  """Asks a process of its own for JAX's devices, so that nothing is held."""
  command = [sys.executable, "-c", _LIST_DEVICES]
  try:
    done = subprocess.run(
      command, capture_output=True, text=True, timeout=_DEVICES_S, check=False
    )
  except subprocess.TimeoutExpired:
    return Line(
      "FAIL",
      "devices",
      f"JAX has not found any within {_DEVICES_S:g} s",
      "Another process may hold them: look with nvidia-smi, or at /dev/accel*.",
    )
  if done.returncode:
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return Line(
      "FAIL",
      "devices",
      last,
      "Try it: python -c 'import flax.nnx, jax; print(jax.devices())'",
    )
  number, platform, kind = done.stdout.strip().splitlines()[-1].split("|")
  found = f"{number} of {kind} ({platform})"
  unused = [path for path in _ACCELERATORS if pathlib.Path(path).exists()]
  if platform == "cpu" and unused and "cpu" not in _asked_platforms():
    return Line(
      "FAIL",
      "devices",
      f"{found}, yet there is {unused[0]}",
      "pip install 'jax[cuda13]' for a GPU, 'jax[tpu]' for a TPU, in the "
      "version of jax.",
    )
  return Line("ok", "devices", found)


def of_port(port: int) -> Line:
  """Tries whether a server could listen."""
  with socket.socket() as server:
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      server.bind(("127.0.0.1", port))
    except OSError as error:
      return Line(
        "warn",
        f"port {port}",
        error.strerror or str(error),
        f"Look with ss -ltnp 'sport = :{port}', or take another: --port.",
      )
  return Line("ok", f"port {port}", "free")


def of_space(name: str, place: pathlib.Path, *, low: int) -> Line:
  """Looks at what is free where files are written."""
  try:
    free = shutil.disk_usage(place).free
  except OSError as error:
    return Line("warn", name, str(error), f"Mount something at {place}.")
  found = f"{_gib(free)} free in {place}"
  if free >= low:
    return Line("ok", name, found)
  fix = "Choose a larger disk by --workdir; --plan tells what a run writes."
  if name == "shared memory":
    fix = (
      "Weights go to servers through it, twice: docker run --shm-size=64g, or "
      "--config.rollout.weights_root=FOLDER."
    )
  return Line("warn", name, found, fix)


def memory_limit(cgroup: pathlib.Path) -> int:
  """Reads how much memory this process may have, in bytes."""
  total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  for name in ("memory.max", "memory/memory.limit_in_bytes"):
    path = cgroup / name
    text = path.read_text().strip() if path.is_file() else ""
    if text.isdigit():
      total = min(total, int(text))
  return total


def of_memory(limit: int) -> Line:
  """Looks at the host's memory."""
  if limit >= 8 * _GIB:
    return Line("ok", "memory", _gib(limit))
  fix = "Raise the container's limit (docker run --memory); tests take 8 GiB."
  return Line("warn", "memory", _gib(limit), fix)


def of_cores(number: int) -> Line:
  """Looks at the cores that this process may use."""
  if number >= 2:
    return Line("ok", "cores", str(number))
  fix = "Ask for two or more: data is read while devices compute."
  return Line("warn", "cores", str(number), fix)


def _asked_platforms() -> str:
  return os.environ.get("JAX_PLATFORMS", "")


def _parts(version: str) -> tuple[int, ...]:
  """Reads the numbers at the start of a version; () where there is none."""
  numbers = []
  for part in version.split("."):
    if not part.isdigit():
      break
    numbers.append(int(part))
  return tuple(numbers)


def _gib(num_bytes: int) -> str:
  return f"{num_bytes / _GIB:,.1f} GiB"


if __name__ == "__main__":
  sys.exit(main())
