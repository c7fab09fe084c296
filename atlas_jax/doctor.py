# SPDX-License-Identifier: Apache-2.0
"""Checks the machine and its packages before a run, and suggests fixes.

  python -m atlas_jax.doctor

Each line is ok, warn or FAIL, with a fix. The exit code is 2 if a line is FAIL,
else 0. None of the checked libraries needs to be installed.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
from importlib import metadata
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
from typing import Literal

from atlas_jax import errors

Status = Literal["ok", "warn", "FAIL"]
Versions = Mapping[str, str]

_SHARED = {
  "optax": "0.2.8",
  "orbax-checkpoint": "0.12.8",
  "transformers": "5.23.0",
  "safetensors": "0.8.0",
}
# The versions in requirements/trainer.txt, by Python version. The packages of
# the last row are the oldest that are supported.
_TESTED = {
  (3, 12): {
    "jax": "0.12.0.1",
    "jaxlib": "0.12.0.1",
    "flax": "0.12.12",
    **_SHARED,
  },
  (3, 11): {"jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8", **_SHARED},
}
_RECOMMENDED, _OLDEST = (3, 12), (3, 11)
# The JAX release that is supported with each Python version.
_SUPPORTED_JAX = {(3, 12): "0.12", (3, 11): "0.10.2"}
# Time limit for JAX to start; it may hang on devices that are in use.
_START_S = 120.0
_START_XLA = "import jax; jax.devices()"
# An absl log line of severity ERROR or FATAL.
_XLA_ERROR = re.compile(r"\b[EF]\S* .*\.cc:\d+\] (.+)")
_LIST_DEVICES = """
import flax.nnx, jax, optax, orbax.checkpoint
devices = jax.devices()
print(len(devices), devices[0].platform, devices[0].device_kind, sep="|")
"""
_ACCELERATORS = ("/dev/nvidia0", "/dev/accel0", "/dev/vfio/0")
# Ports of the first rollout server of each role.
_PORTS = (8765, 8766)
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Line:
  """The result of one check; `fix` is empty if the status is ok."""

  status: Status
  name: str
  found: str
  fix: str = ""

  def __str__(self) -> str:
    line = f"{self.status:<5} {self.name:<18} {self.found}"
    return f"{line}\n{'':<25}{self.fix}" if self.fix else line


def main(argv: Sequence[str] = ()) -> int:
  """Prints all lines, or help if `argv` has words; returns the exit code."""
  if argv:
    sys.stdout.write(f"{__doc__}\n")
    is_help = set(argv) <= {"--help", "-h"}
    return int(errors.Exit.DONE if is_help else errors.Exit.CONFIG)
  has_failed = False
  for line in diagnose():
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
    has_failed |= line.status == "FAIL"
  return int(errors.Exit.CONFIG if has_failed else errors.Exit.DONE)


def diagnose() -> Iterator[Line]:
  """Yields the results of all checks."""
  python, versions = sys.version_info[:2], installed()
  yield check_python(python, versions.get("jax"))
  yield from check_versions(python, versions)
  yield from check_version_pairs(versions)
  if flags := os.environ.get("XLA_FLAGS"):
    yield check_xla_flags(flags)
  yield check_devices()
  yield from map(check_port, _PORTS)
  yield check_space("disk", pathlib.Path.cwd(), low=50 * _GIB)
  yield check_space("shared memory", pathlib.Path("/dev/shm"), low=_GIB)
  yield check_memory(memory_limit(pathlib.Path("/sys/fs/cgroup")))
  yield check_cores(len(os.sched_getaffinity(0)))


def installed() -> dict[str, str]:
  """Returns the versions of all installed packages, by normalized name."""
  return {
    dist.name.lower().replace("_", "-"): dist.version
    for dist in metadata.distributions()
    if dist.name
  }


def check_python(python: tuple[int, int], jax: str | None) -> Line:
  """Checks that the versions of Python and JAX are a supported pair."""
  found = f"{'.'.join(map(str, python))} with jax {jax or 'not installed'}"
  supported = _SUPPORTED_JAX.get(python, "none")
  if jax and f"{jax}.".startswith(f"{supported}."):
    return Line("ok", "python", f"{found}, a supported pair")
  pairs = " or ".join(
    f"Python {major}.{minor} with jax {release}"
    for (major, minor), release in _SUPPORTED_JAX.items()
  )
  status = "FAIL" if python < _OLDEST else "warn"
  fix = f"Install {pairs}; the first is recommended."
  return Line(status, "python", f"{found}, not a supported pair", fix)


def check_versions(
  python: tuple[int, int], versions: Versions
) -> Iterator[Line]:
  """Checks the packages that training requires."""
  for name, tested in _TESTED.get(python, _TESTED[_RECOMMENDED]).items():
    found, oldest = versions.get(name), _TESTED[_OLDEST][name]
    if found is None:
      fix = "pip install -r requirements/trainer.txt"
      yield Line("FAIL", name, "not installed", fix)
    elif found == tested:
      yield Line("ok", name, found)
    elif _parts(found) < _parts(oldest):
      fix = f"pip install '{name}>={oldest}'"
      yield Line("FAIL", name, f"{found}, older than {oldest}", fix)
    else:
      fix = f"Tests run with {tested}; install it if something fails."
      yield Line("warn", name, found, fix)


def check_version_pairs(versions: Versions) -> Iterator[Line]:
  """Checks for versions with known defects, alone or in combination."""
  jax, flax = (_parts(versions.get(name, "")) for name in ("jax", "flax"))
  if jax >= (0, 11, 1) and flax and flax <= (0, 12, 8):
    yield Line(
      "warn",
      "jax with flax",
      f"{versions['jax']} with {versions['flax']}, which does not support it",
      "This Flax uses a type that JAX 0.11.1 removed. If the import fails (see "
      "devices), install a newer Flax, or JAX 0.10.2.",
    )
  jaxlib = versions.get("jaxlib")
  for name in ("jax", "jax-cuda12-plugin", "jax-cuda13-plugin"):
    if jaxlib and name in versions and versions[name] != jaxlib:
      yield Line(
        "FAIL",
        f"{name} with jaxlib",
        f"{versions[name]} with {jaxlib}",
        f"The versions must match: pip install '{name}=={jaxlib}'",
      )
  if _parts(versions.get("safetensors", ""))[:2] == (0, 8):
    yield Line(
      "warn",
      "safetensors",
      "0.8 writes wrong bytes for non-contiguous arrays",
      "atlas_jax does not write with it. In your own scripts, pass arrays "
      "through numpy.ascontiguousarray.",
    )
  if "latex2sympy2" in versions:
    yield Line(
      "warn",
      "latex2sympy2",
      "pins an old antlr4, which breaks math-verify",
      "pip uninstall latex2sympy2; pip install math-verify[antlr4-13-2]",
    )
  if "vllm" in versions and _parts(versions["vllm"]) < (0, 32):
    yield Line(
      "FAIL",
      "vllm",
      f"{versions['vllm']} has known vulnerabilities and other interfaces",
      "pip install 'vllm>=0.32.0'",
    )
  if "jax-cuda12-plugin" in versions and "torch" in versions:
    yield Line(
      "warn",
      "jax with torch",
      "CUDA 12 for JAX and torch's CUDA in one environment",
      "Install vLLM in a separate environment (scripts/install_rollout.sh).",
    )


def check_xla_flags(flags: str) -> Line:
  """Checks XLA_FLAGS in a child process: XLA aborts on an unknown flag."""
  try:
    done = _run_python(_START_XLA, XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
  except subprocess.TimeoutExpired:
    found = f"JAX did not start within {_START_S:g} s"
    return Line("FAIL", "XLA_FLAGS", found, "Run unset XLA_FLAGS.")
  if done.returncode == 0:
    return Line("ok", "XLA_FLAGS", flags)
  error = _XLA_ERROR.search(done.stderr)
  return Line(
    "FAIL",
    "XLA_FLAGS",
    error[1] if error else _last_line(done.stderr),
    "Remove the flag: the installed XLA does not accept it and aborts.",
  )


def check_devices() -> Line:
  """Lists JAX's devices in a child process, so this one does not hold them."""
  try:
    done = _run_python(_LIST_DEVICES)
  except subprocess.TimeoutExpired:
    return Line(
      "FAIL",
      "devices",
      f"JAX found no devices within {_START_S:g} s",
      "Check whether another process uses them: nvidia-smi, fuser /dev/accel*.",
    )
  if done.returncode:
    return Line(
      "FAIL",
      "devices",
      _last_line(done.stderr),
      "Run python -c 'import flax.nnx, jax; print(jax.devices())'",
    )
  number, platform, kind = done.stdout.strip().splitlines()[-1].split("|")
  found = f"{number} of {kind} ({platform})"
  unused = [path for path in _ACCELERATORS if pathlib.Path(path).exists()]
  if platform == "cpu" and unused and "cpu" not in _asked_platforms():
    return Line(
      "FAIL",
      "devices",
      f"{found}, but {unused[0]} exists",
      "pip install 'jax[cuda13]' for a GPU or 'jax[tpu]' for a TPU, in the "
      "version of jax.",
    )
  return Line("ok", "devices", found)


def check_port(port: int) -> Line:
  """Checks that a server can listen on a port."""
  with socket.socket() as server:
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      server.bind(("127.0.0.1", port))
    except OSError as error:
      return Line(
        "warn",
        f"port {port}",
        error.strerror or str(error),
        f"Find its user with ss -ltnp 'sport = :{port}', or change --port.",
      )
  return Line("ok", f"port {port}", "free")


def check_space(name: str, place: pathlib.Path, *, low: int) -> Line:
  """Checks that a folder has at least `low` bytes free."""
  try:
    free = shutil.disk_usage(place).free
  except OSError as error:
    return Line("warn", name, str(error), f"Mount a file system at {place}.")
  found = f"{_gib(free)} free in {place}"
  if free >= low:
    return Line("ok", name, found)
  fix = "Set --workdir to a larger disk; --plan shows what a run writes."
  if name == "shared memory":
    fix = (
      "It holds two copies of the weights sent to servers: use docker run "
      "--shm-size=64g, or --config.rollout.weights_root=FOLDER."
    )
  return Line("warn", name, found, fix)


def memory_limit(cgroup: pathlib.Path) -> int:
  """Returns the memory limit of this process in bytes."""
  total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  for name in ("memory.max", "memory/memory.limit_in_bytes"):
    path = cgroup / name
    text = path.read_text().strip() if path.is_file() else ""
    if text.isdigit():
      total = min(total, int(text))
  return total


def check_memory(limit: int) -> Line:
  """Checks the memory limit of this process."""
  if limit >= 8 * _GIB:
    return Line("ok", "memory", _gib(limit))
  fix = "Raise the container's limit (docker run --memory); tests need 8 GiB."
  return Line("warn", "memory", _gib(limit), fix)


def check_cores(number: int) -> Line:
  """Checks the number of cores available to this process."""
  if number >= 2:
    return Line("ok", "cores", str(number))
  fix = "Use two or more: data is read while devices compute."
  return Line("warn", "cores", str(number), fix)


def _run_python(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, "-c", code],
    env={**os.environ, **environ},
    capture_output=True,
    text=True,
    timeout=_START_S,
    check=False,
  )


def _last_line(text: str) -> str:
  return (text.strip().splitlines() or ["no message"])[-1]


def _asked_platforms() -> str:
  return os.environ.get("JAX_PLATFORMS", "")


def _parts(version: str) -> tuple[int, ...]:
  """Returns the leading numbers of a version; () if there are none."""
  numbers = []
  for part in version.split("."):
    if not part.isdigit():
      break
    numbers.append(int(part))
  return tuple(numbers)


def _gib(num_bytes: int) -> str:
  return f"{num_bytes / _GIB:,.1f} GiB"


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
