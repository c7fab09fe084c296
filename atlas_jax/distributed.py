# SPDX-License-Identifier: Apache-2.0
"""Multi-process training: initialization, barriers and host-side broadcasts.

Each process runs the same program on its own devices and loads its own rows. If
one process is lost, JAX aborts the others within `max_silence_s`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import ipaddress
import itertools
import json
import socket
import time
from typing import Any, NamedTuple, TypeVar
import zlib

from absl import logging
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from atlas_jax import errors

_POLL_S = 0.2
_SHUTDOWN_S = 60
_MAX_FILES_S = 3600
_MAX_SHOWN = 40
_Json = TypeVar("_Json")
# Each message of a broken connection contains one of these.
_LOST = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "oordination")


class Address(NamedTuple):
  """The coordinator's HOST:PORT, the number of processes and this one's id."""

  coordinator: str
  num_processes: int
  process_id: int


def is_cluster_job(environ: Mapping[str, str]) -> bool:
  """Returns whether Slurm, Open MPI or a TPU pod started several processes."""
  counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
  return (
    any(environ.get(name, "1") != "1" for name in counts)
    or "," in environ.get("TPU_WORKER_HOSTNAMES", "")
    or "MEGASCALE_COORDINATOR_ADDRESS" in environ
  )


def initialize(
  address: Address | None, *, max_wait_s: int, max_silence_s: int
) -> None:
  """Connects all processes. Must be called before any device is used.

  Args:
    address: of the coordinator; None to detect it from the cluster.
    max_wait_s: time limit for all processes to connect.
    max_silence_s: a process without a heartbeat for so long counts as lost.

  Raises:
    errors.ConfigError: if no cluster is detected, or the address is invalid.
    errors.LostProcessError: if a process did not connect; lists the missing
      ones. With `address` of None, JAX aborts instead.
  """
  if address is not None:
    _check(address)
    logging.info("Waiting for processes: process=%d of %d", *address[:0:-1])
    _wait_for_all(address, deadline=time.monotonic() + max_wait_s)
  try:
    jax.distributed.initialize(
      coordinator_address=address and address.coordinator,
      coordinator_bind_address=address and _bind_address(address),
      num_processes=address and address.num_processes,
      process_id=address and address.process_id,
      initialization_timeout=max_wait_s,
      heartbeat_timeout_seconds=max_silence_s,
      shutdown_timeout_seconds=_SHUTDOWN_S,
    )
  except ValueError as error:
    raise errors.ConfigError(
      "The coordinator's address is not set.",
      where="--distributed",
      why=str(error),
      fix="Set --coordinator_address=HOST:PORT, --num_processes and "
      "--process_id.",
    ) from error
  logging.info(
    "Connected processes: process=%d of %d, local devices=%d of %d",
    jax.process_index(),
    jax.process_count(),
    jax.local_device_count(),
    jax.device_count(),
  )


def is_first() -> bool:
  """Returns whether this is process 0, which writes files and logs metrics."""
  return jax.process_index() == 0


def wait(name: str) -> None:
  """Waits at a barrier for all processes; `name` must be unique.

  The barrier uses the coordination service, not a device collective: the first
  process may write files for longer than the timeout of a collective.
  """
  barrier = ocp.multihost.get_barrier_sync_fn()
  barrier(key=name, timeout_ms=1000 * _MAX_FILES_S)


def gather(array: jax.Array) -> np.ndarray:
  """Returns the full value of a sharded array in every process."""
  return multihost_utils.process_allgather(array, tiled=True)


def exchange(text: str) -> list[str]:
  """Returns the texts of all processes, in order of process index.

  Waits at a barrier first. Texts may be padded with spaces at the end.
  """
  if jax.process_count() == 1:
    return [text]
  wait(f"exchange/{next(_exchanges)}")
  mine = text.encode()
  longest = int(multihost_utils.process_allgather(np.int32(len(mine))).max())
  padded = np.frombuffer(mine.ljust(longest), np.uint8)
  rows = multihost_utils.process_allgather(padded)
  return [row.tobytes().decode() for row in rows]


_exchanges = itertools.count()  # Each barrier needs a unique name.


class FirstProcessBroadcast:
  """Runs functions in the first process and broadcasts their results.

  For work that must be done once, e.g. a request to a server. Implements
  `types.OnFirstProcess`. All processes must make the same calls in the same
  order. No devices are used, so a thread may wait here while another trains.
  """

  def __init__(self, name: str) -> None:
    """Sets the name that distinguishes these calls from other broadcasts."""
    self._name, self._numbers = name, itertools.count()

  def __call__(self, make: Callable[[], _Json]) -> _Json:
    """Returns the JSON value of `make` in the first process, within an hour.

    Raises:
      errors.LostProcessError: in the other processes, if `make` raised in the
        first.
    """
    if jax.process_count() == 1:
      return make()
    client = ocp.multihost.get_jax_distributed_client()
    key = f"{self._name}/{next(self._numbers)}"
    if is_first():
      made = _FAILED
      try:
        value = make()
        made = zlib.compress(json.dumps(value).encode(), _FAST)
      finally:
        _send(client, key, made)
    else:
      made = _receive(client, key)
      if made == _FAILED:
        raise lost("process 0", f"Process 0 failed during {self._name}.")
      value = json.loads(zlib.decompress(made))
    wait(key)
    if is_first():
      client.key_value_delete(f"{key}/")
    return value


# Messages of the coordination service are limited to 4 MB.
_MAX_MESSAGE = 2**20
_FAILED = b""
_FAST = 1  # zlib level.


def _send(
  client: Any,  # Any: JAX names no type for it.
  key: str,
  data: bytes,
) -> None:
  """Stores bytes in the coordination service, in parts."""
  count = -(-len(data) // _MAX_MESSAGE)
  for i in range(count):
    part = data[i * _MAX_MESSAGE : (i + 1) * _MAX_MESSAGE]
    client.key_value_set_bytes(f"{key}/{i}", part)
  client.key_value_set_bytes(f"{key}/count", str(count).encode())


def _receive(
  client: Any,  # Any: as in `_send`.
  key: str,
) -> bytes:
  """Waits for the bytes that the first process stores under `key`."""
  timeout_ms = 1000 * _MAX_FILES_S
  get = client.blocking_key_value_get_bytes
  count = int(get(f"{key}/count", timeout_ms))
  return b"".join(get(f"{key}/{i}", timeout_ms) for i in range(count))


def agree(facts: Mapping[str, str]) -> None:
  """Validates that `facts` are the same in all processes.

  Raises:
    errors.ConfigError: in every process, with the values that differ.
  """
  if jax.process_count() == 1:
    return
  lines = _differences(list(map(json.loads, exchange(json.dumps(facts)))))
  if lines:
    raise errors.ConfigError(
      "The processes do not run the same job.",
      where=f"process {jax.process_index()} of {jax.process_count()}",
      why="These differ:\n    " + "\n    ".join(lines),
      fix="Start all processes with the same command line, code and data, and "
      "with a --workdir on a shared file system.",
    )


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Waits on exit for all processes, since the first may be writing files.

  Raises:
    errors.LostProcessError: in place of JAX's error for a broken connection.
  """
  try:
    yield
    wait("end")
  except errors.PreemptedError:
    wait("preempted")
    raise
  except jax.errors.JaxRuntimeError as error:
    text = str(error).partition("\n")[0]
    if jax.process_count() == 1 or not any(mark in text for mark in _LOST):
      raise
    raise lost(f"process {jax.process_index()}", text) from error


def lost(where: str, why: str) -> errors.LostProcessError:
  """Returns the error for the loss of another process."""
  return errors.LostProcessError(
    "Another process of this run was lost.",
    where=where,
    why=why,
    fix="Check the end of the other processes' logs for the cause. Then run "
    "the same command again to resume from the last checkpoint.",
  )


def _differences(all_facts: Sequence[Mapping[str, str]]) -> list[str]:
  """Formats a line for each fact that differs between processes."""
  lines = []
  for name in sorted({name for facts in all_facts for name in facts}):
    values = [facts.get(name, "none") for facts in all_facts]
    if len(set(values)) > 1:
      by_value = {
        value: [i for i, other in enumerate(values) if other == value]
        for value in values
      }
      lines.append(
        f"{name}: "
        + "; ".join(
          f"{value[:_MAX_SHOWN]} (process {', '.join(map(str, who))})"
          for value, who in by_value.items()
        )
      )
  return lines


def _check(address: Address) -> None:
  coordinator, count, number = address
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdecimal() or not 0 <= number < count:
    raise errors.ConfigError(
      "coordinator_address must be HOST:PORT, and process_id must be in "
      f"[0, {count}).",
      where=f"--coordinator_address={coordinator} --num_processes={count} "
      f"--process_id={number}",
      why="The address is that of process 0, and ids number the processes.",
      fix="For example, --coordinator_address=127.0.0.1:9876 "
      "--num_processes=2 --process_id=0, and the same with --process_id=1.",
    )


def _bind_address(address: Address) -> str | None:
  """Returns where the coordinator listens; None for JAX's default, anywhere.

  At a loopback address no other machine can connect. Other names may resolve to
  127.0.1.1 on their own machine, so there JAX listens everywhere.
  """
  host = address.coordinator.rpartition(":")[0].strip("[]")
  try:
    is_local = host == "localhost" or ipaddress.ip_address(host).is_loopback
  except ValueError:
    is_local = False
  return address.coordinator if is_local else None


def _wait_for_all(address: Address, *, deadline: float) -> None:
  """Waits for all processes at the address that JAX uses afterwards.

  JAX alone would abort at its timeout, without the ids of missing processes.
  """
  host, _, port = address.coordinator.rpartition(":")
  if address.process_id == 0:
    _count(host.strip("[]"), int(port), address.num_processes, deadline)
    return
  while time.monotonic() < deadline:
    with contextlib.suppress(OSError):
      link = socket.create_connection((host.strip("[]"), int(port)), 5)
      with link:
        link.settimeout(max(deadline - time.monotonic(), _POLL_S) + 5)
        link.sendall(f"{address.process_id}\n".encode())
        if link.recv(1):
          return
    time.sleep(_POLL_S)
  raise _missing(address, "Process 0 was unreachable, or timed out itself.")


def _count(host: str, port: int, num_processes: int, deadline: float) -> None:
  """Waits in process 0 until all other processes have sent their ids."""
  missing = set(range(1, num_processes))
  with contextlib.ExitStack() as links:
    try:
      server = links.enter_context(socket.create_server((host, port)))
    except OSError as error:
      raise errors.ConfigError(
        "Process 0 cannot listen at coordinator_address.",
        where=f"--coordinator_address={host}:{port}",
        why=str(error),
        fix="Set it to an address of process 0's machine and a free port.",
      ) from error
    server.settimeout(_POLL_S)
    here = []
    while missing:
      if time.monotonic() > deadline:
        numbers = ", ".join(map(str, sorted(missing)))
        raise _missing(
          Address(f"{host}:{port}", num_processes, 0),
          f"Missing processes: {numbers}.",
        )
      with contextlib.suppress(OSError, ValueError):
        link = links.enter_context(server.accept()[0])
        link.settimeout(5)
        missing.discard(int(link.recv(16)))
        here.append(link)
    for link in here:
      with contextlib.suppress(OSError):
        link.sendall(b"!")


def _missing(address: Address, why: str) -> errors.LostProcessError:
  return errors.LostProcessError(
    f"Not all of {address.num_processes} processes connected in time.",
    where=f"process {address.process_id}, at {address.coordinator}",
    why=why,
    fix="Check their logs and that no firewall blocks the port; raise "
    "--max_process_wait_s if they start slowly.",
  )
