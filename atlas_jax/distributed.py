# SPDX-License-Identifier: Apache-2.0
"""Several processes that train as one: how they meet, and what they agree on.

Each runs the same program on its own devices, and loads its own rows. If one is
lost the others cannot go on: JAX aborts them within `max_silence_s`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
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
# What is broken says so in many words; these are in all of them.
_LOST = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "oordination")


class Address(NamedTuple):
  """Where process 0 is met, how many there are, and which one this is."""

  coordinator: str
  num_processes: int
  process_id: int


def is_told(environ: Mapping[str, str]) -> bool:
  """Tells whether Slurm, Open MPI or a TPU pod started several processes."""
  counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
  return (
    any(environ.get(name, "1") != "1" for name in counts)
    or "," in environ.get("TPU_WORKER_HOSTNAMES", "")
    or "MEGASCALE_COORDINATOR_ADDRESS" in environ
  )


def initialize(
  address: Address | None, *, max_wait_s: int, max_silence_s: int
) -> None:
  """Waits until all processes are there. Nothing may use a device before.

  Args:
    address: where they meet; None asks the cluster.
    max_wait_s: what they may take to come.
    max_silence_s: after so long without a sign of life, one counts as lost.

  Raises:
    errors.ConfigError: if no cluster tells, or the address cannot be used.
    errors.LostProcessError: naming those that did not come, where the address
      is given. Otherwise JAX aborts.
  """
  if address is not None:
    _check(address)
    logging.info("Process %d of %d: waiting for the others.", *address[:0:-1])
    _call_roll(address, deadline=time.monotonic() + max_wait_s)
  try:
    jax.distributed.initialize(
      coordinator_address=address and address.coordinator,
      num_processes=address and address.num_processes,
      process_id=address and address.process_id,
      initialization_timeout=max_wait_s,
      heartbeat_timeout_seconds=max_silence_s,
      shutdown_timeout_seconds=_SHUTDOWN_S,
    )
  except ValueError as error:
    raise errors.ConfigError(
      "It is not known where the processes meet.",
      where="--distributed",
      why=str(error),
      fix="Set --coordinator_address=HOST:PORT, --num_processes and "
      "--process_id.",
    ) from error
  logging.info(
    "Process %d of %d, with %d of %d devices.",
    *(jax.process_index(), jax.process_count()),
    *(jax.local_device_count(), jax.device_count()),
  )


def is_first() -> bool:
  """Tells whether this process is the one that writes, and speaks for all."""
  return jax.process_index() == 0


def wait(name: str) -> None:
  """Waits until all processes are here; `name` says where that is.

  It is no collective: the first may be at its files for longer than those wait.
  """
  barrier = ocp.multihost.get_barrier_sync_fn()
  barrier(key=name, timeout_ms=1000 * _MAX_FILES_S)


def gather(array: jax.Array) -> np.ndarray:
  """Brings an array that lies on all processes' devices to each of them."""
  return multihost_utils.process_allgather(array, tiled=True)


def exchange(text: str) -> list[str]:
  """Gives a text to all processes, and gets theirs, in order.

  It waits for those that are at their files. Spaces at the end may be added.
  """
  if jax.process_count() == 1:
    return [text]
  wait(f"exchange/{next(_exchanges)}")
  mine = text.encode()
  longest = int(multihost_utils.process_allgather(np.int32(len(mine))).max())
  padded = np.frombuffer(mine.ljust(longest), np.uint8)
  told = multihost_utils.process_allgather(padded)
  return [row.tobytes().decode() for row in told]


_exchanges = itertools.count()  # No two waits have one name.


class OnFirstProcess:
  """Lets the first process do what must be done once, such as asking a server.

  The others wait, and get what it got. All call it alike: the n-th call of one
  is the n-th call of all. No devices are used, so a thread may wait here while
  another trains.
  """

  def __init__(self, name: str) -> None:
    """Tells these calls from those of others, by a name."""
    self._name, self._numbers = name, itertools.count()

  def __call__(self, make: Callable[[], _Json]) -> _Json:
    """Gives what `make` makes in the first process; JSON.

    Raises:
      errors.LostProcessError: in the others, if it failed there, or took more
        than an hour.
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
        raise lost("process 0", f"It failed at {self._name}.")
      value = json.loads(zlib.decompress(made))
    wait(key)
    if is_first():
      client.key_value_delete(f"{key}/")
    return value


# A message of the coordination service is not to be larger than 4 MB.
_MAX_MESSAGE = 2**20
_FAILED = b""
_FAST = 1  # Of zlib.


def _send(
  client: Any,  # Any: JAX names no type for it.
  key: str,
  data: bytes,
) -> None:
  """Leaves bytes with the coordination service."""
  count = -(-len(data) // _MAX_MESSAGE)
  for i in range(count):
    part = data[i * _MAX_MESSAGE : (i + 1) * _MAX_MESSAGE]
    client.key_value_set_bytes(f"{key}/{i}", part)
  client.key_value_set_bytes(f"{key}/count", str(count).encode())


def _receive(
  client: Any,  # Any: as in `_send`.
  key: str,
) -> bytes:
  """Waits for bytes that the first process sends."""
  timeout_ms = 1000 * _MAX_FILES_S
  get = client.blocking_key_value_get_bytes
  count = int(get(f"{key}/count", timeout_ms))
  return b"".join(get(f"{key}/{i}", timeout_ms) for i in range(count))


def agree(facts: Mapping[str, str]) -> None:
  """Refuses to go on where the facts of the processes differ.

  Raises:
    errors.ConfigError: in every process, with a table.
  """
  if jax.process_count() == 1:
    return
  lines = _differences(list(map(json.loads, exchange(json.dumps(facts)))))
  if lines:
    raise errors.ConfigError(
      "The processes do not run the same job.",
      where=f"process {jax.process_index()} of {jax.process_count()}",
      why="They differ in:\n    " + "\n    ".join(lines),
      fix="Start all with the same command line, code and data, and with a "
      "--workdir that all of them see.",
    )


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Ends when all processes do, as the first may still be at its files.

  Raises:
    errors.LostProcessError: in place of what a broken connection raises.
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
  """Tells that another process is gone."""
  return errors.LostProcessError(
    "Another process of this run is lost.",
    where=where,
    why=why,
    fix="Look at the end of the other processes' logs for the cause. Then run "
    "the same command again: it goes on from the last checkpoint.",
  )


def _differences(told: Sequence[Mapping[str, str]]) -> list[str]:
  """Makes a line of each fact that is not the same for all."""
  lines = []
  for name in sorted({name for facts in told for name in facts}):
    values = [facts.get(name, "none") for facts in told]
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
      "The processes cannot meet like this.",
      where=f"--coordinator_address={coordinator} --num_processes={count} "
      f"--process_id={number}",
      why="The address is HOST:PORT of process 0, and ids go from 0 to one "
      "less than the number of processes.",
      fix="For example --coordinator_address=127.0.0.1:9876 --num_processes=2 "
      "--process_id=0, and the same with --process_id=1.",
    )


def _call_roll(address: Address, *, deadline: float) -> None:
  """Waits for all, at the address that JAX takes over afterwards.

  JAX would abort after its own wait, and name nobody.
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
  raise _absent(address, "Process 0 was not there, or waited in vain itself.")


def _count(host: str, port: int, num_processes: int, deadline: float) -> None:
  """Waits, as process 0, until every other one has said its number."""
  missing = set(range(1, num_processes))
  with contextlib.ExitStack() as links:
    try:
      server = links.enter_context(socket.create_server((host, port)))
    except OSError as error:
      raise errors.ConfigError(
        "Process 0 cannot be met at its address.",
        where=f"--coordinator_address={host}:{port}",
        why=str(error),
        fix="Give an address of the machine of process 0, and a free port.",
      ) from error
    server.settimeout(_POLL_S)
    here = []
    while missing:
      if time.monotonic() > deadline:
        numbers = ", ".join(map(str, sorted(missing)))
        raise _absent(
          Address(f"{host}:{port}", num_processes, 0),
          f"These did not come: {numbers}.",
        )
      with contextlib.suppress(OSError, ValueError):
        link = links.enter_context(server.accept()[0])
        link.settimeout(5)
        missing.discard(int(link.recv(16)))
        here.append(link)
    for link in here:
      with contextlib.suppress(OSError):
        link.sendall(b"!")


def _absent(address: Address, why: str) -> errors.LostProcessError:
  return errors.LostProcessError(
    f"Not all of {address.num_processes} processes came in time.",
    where=f"process {address.process_id}, at {address.coordinator}",
    why=why,
    fix="Look at their logs; raise --max_process_wait_s if they are slow to "
    "start. No firewall may be between them and that port.",
  )
