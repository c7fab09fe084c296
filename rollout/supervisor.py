# SPDX-License-Identifier: Apache-2.0
"""Starts rollout servers, runs training next to them, stops what it started.

Every process runs under `rollout.child_process`, so that all end with the
launcher, however it ends. If the launcher is killed, training gets SIGTERM and
`TRAINING_GRACE_S` seconds to finish its step and save. Servers stop within
`SERVER_GRACE_S` seconds after training, which needs them until then.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

from absl import logging
import httpx2
import pydantic

from atlas_jax import errors
from rollout import child_process, wire

SERVER_GRACE_S = 10.0
# Training first finishes its step and saves.
TRAINING_GRACE_S = 300.0
_ROOT = pathlib.Path(__file__).resolve().parents[1]
_POLL_S = 0.2
_GUARDED = "ATLAS_GUARDED"
_PROBE_S = 5.0
_PROGRESS_S = 10.0
_CHECK_S = 10.0
_MAX_RESTARTS = 3
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@dataclasses.dataclass(frozen=True)
class Command:
  """What to run. `env` adds to this process's; "" in it removes a name."""

  name: str
  argv: tuple[str, ...]
  env: Mapping[str, str]
  log: pathlib.Path | None  # None: the terminal.
  grace_s: float


@dataclasses.dataclass(frozen=True, eq=False)
class Server:
  """A rollout server that is to be started."""

  role: wire.Role
  url: str
  command: Command


def is_guarded() -> bool:
  """Tells whether a launcher watches over this process."""
  return _GUARDED in os.environ


def check_ports(host: str, base: int, count: int) -> None:
  """Refuses ports that are in use.

  Raises:
    errors.ConfigError: naming one, and a base from which all are free.
  """
  taken = [p for p in range(base, base + count) if not _is_free(host, p)]
  if not taken:
    return
  starts = range(base + count, 65536 - count, count)
  free = next(
    s for s in starts if all(_is_free(host, s + i) for i in range(count))
  )
  raise errors.ConfigError(
    f"Port {taken[0]} is taken.",
    where=f"vllm_port={base}, with {count} servers",
    why=f"Another program listens on {host}:{taken[0]}.",
    fix=f"Stop it, or set vllm_port={free}.",
  )


def _is_free(host: str, port: int) -> bool:
  with socket.socket() as probe:
    # As servers do: what a closed connection leaves behind is no obstacle.
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      probe.bind((host, port))
    except OSError:
      return False
  return True


def run(
  servers: Sequence[Server], training: Command, *, max_wait_s: float
) -> int:
  """Starts the servers, then runs `training` to its end.

  The first SIGINT, SIGTERM, SIGHUP or SIGUSR1 lets training save, for which it
  has `TRAINING_GRACE_S`; a second one it does not wait for. The servers stay
  until it is done.

  Returns:
    The exit code of `training`.

  Raises:
    errors.RolloutError: if a server ends or is not healthy in time.
    errors.PreemptedError: if asked to stop before training began.
    errors.LostProcessError: if training was aborted.
    errors.AtlasError: if it was killed.
  """
  with _signals() as asked, _Processes() as processes:
    started = {
      server: processes.start_server(server.command) for server in servers
    }
    _wait_healthy(started, asked, max_wait_s)
    trainer = processes.start_training(training)
    code = _watch(trainer, started, asked, processes)
  if asked and code == -signal.SIGTERM:  # Its guard had not begun.
    raise _stopped(asked[0])
  if code < 0 or code >= child_process.SIGNALLED:
    name = signal.Signals(
      -code if code < 0 else code - child_process.SIGNALLED
    ).name
    if name == "SIGABRT":
      raise errors.LostProcessError(
        f"{training.name} was aborted by its own libraries.",
        where=" ".join(training.argv),
        why="The lines above tell. JAX aborts each of several processes when "
        "another is lost, or does not come.",
        fix="Look at the end of the other processes' logs for the cause. Then "
        "run the same command again: it goes on from the last checkpoint.",
      )
    raise errors.AtlasError(
      f"{training.name} was killed by {name}.",
      where=" ".join(training.argv),
      why="Someone killed it, it did not save in time after it was asked to "
      "stop, or the machine ran out of memory.",
      fix="Run the same command again: it goes on from the last checkpoint.",
    )
  return code


class _Processes:
  """The processes of one launch; leaving the context ends them all.

  A guard watches one end of a pipe. The other end of training's is this
  process's alone; that of the servers' is training's as well, whose guard holds
  it until training has saved.
  """

  def __init__(self) -> None:
    self._guarded: list[tuple[Command, subprocess.Popen[bytes]]] = []
    self._of_training, self._of_servers = os.pipe(), os.pipe()

  def __enter__(self) -> "_Processes":
    return self

  def start_server(self, command: Command) -> subprocess.Popen[bytes]:
    """Starts a server, which ends after training."""
    return self._start(command, self._of_servers[0], ())

  def start_training(self, command: Command) -> subprocess.Popen[bytes]:
    """Starts training, which ends with this process."""
    return self._start(command, self._of_training[0], self._of_servers[1:])

  def _start(
    self, command: Command, watched: int, held: Sequence[int]
  ) -> subprocess.Popen[bytes]:
    """Starts a command under its guard, whose signals and code are its own."""
    env = {**os.environ, _GUARDED: "1", **command.env}
    env = {k: v for k, v in env.items() if v}
    with contextlib.ExitStack() as stack:
      output = None
      if command.log is not None:
        command.log.parent.mkdir(parents=True, exist_ok=True)
        output = stack.enter_context(command.log.open("ab"))
      # The guard must not get the terminal's Ctrl-C: it is for us to pass on.
      process = subprocess.Popen(
        [
          *(sys.executable, "-m", "rollout.child_process"),
          *(str(watched), str(command.grace_s), *command.argv),
        ],
        cwd=_ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=[watched, *held],
        start_new_session=True,
      )
    self._guarded.append((command, process))
    return process

  def __exit__(self, *error: object) -> None:
    # First all are told, then all are waited for.
    for _, process in self._guarded:
      process.terminate()
    for end in (*self._of_training, *self._of_servers):
      os.close(end)
    for command, process in self._guarded:
      try:
        process.wait(command.grace_s + _PROBE_S)
      except subprocess.TimeoutExpired:
        logging.error("%s (%d) does not end.", command.name, process.pid)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
  """Collects signals instead of letting them break into a clean-up."""
  asked: list[int] = []
  old = {n: signal.signal(n, lambda n, _: asked.append(n)) for n in _SIGNALS}
  try:
    yield asked
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)


def _wait_healthy(
  started: Mapping[Server, subprocess.Popen[bytes]],
  asked: Sequence[int],
  max_wait_s: float,
) -> None:
  """Waits until every server says that it is healthy."""
  waiting = {server: "not asked yet" for server in started}
  begun = told = time.monotonic()
  while waiting:
    for server in list(waiting):
      if asked:
        raise _stopped(asked[0])
      if started[server].poll() is not None:
        code = started[server].returncode
        raise _unavailable(server, f"It ended with exit code {code}.")
      waiting[server] = _trouble(server)
      if not waiting[server]:
        del waiting[server]
        logging.info("The %s is ready.", server.command.name)
    now = time.monotonic()
    for server, trouble in waiting.items():
      if now - begun > max_wait_s:
        why = f"It was not healthy within {max_wait_s:.0f} s: {trouble}."
        raise _unavailable(server, why)
      if now - told > _PROGRESS_S:
        logging.info(
          "Waiting for the %s, %.0f of %.0f s: %s. Log: %s",
          *(server.command.name, now - begun, max_wait_s, trouble),
          server.command.log,
        )
    told = now if now - told > _PROGRESS_S else told
    time.sleep(_POLL_S)


def _stopped(number: int) -> errors.PreemptedError:
  return errors.PreemptedError(
    f"Stopped by {signal.Signals(number).name}.",
    where="launcher",
    why="The process was asked to stop before training began.",
    fix="Run the same command again.",
  )


async def _ask(server: Server) -> wire.Health | str:
  """Asks a server how it is; gives the reason if it does not tell."""
  token = os.environ.get("ATLAS_ROLLOUT_TOKEN", "")
  headers = {"Authorization": f"Bearer {token}"} if token else {}
  try:
    # httpx2's own time-out is for each read: a slow dripper would pass it.
    async with asyncio.timeout(_PROBE_S), httpx2.AsyncClient() as client:
      reply = await client.get(f"{server.url}/health", headers=headers)
    return wire.Health.model_validate_json(reply.content)
  except TimeoutError:
    return f"no answer within {_PROBE_S:.0f} s"
  except httpx2.HTTPError as error:
    return str(error) or type(error).__name__
  except pydantic.ValidationError:
    return "what answers is no rollout server"


def _trouble(server: Server) -> str:
  """Says what is wrong with a server; "" if it is well."""
  health = asyncio.run(_ask(server))
  if isinstance(health, str):
    return health
  if (health.status, health.role) != ("ok", server.role):
    return f"a {health.role} server that is {health.status}"
  return ""


def _is_lost(server: Server) -> bool:
  """Tells whether a server says itself that it will not work again."""
  health = asyncio.run(_ask(server))
  return not isinstance(health, str) and health.status in ("dead", "hung")


def _unavailable(server: Server, why: str) -> errors.RolloutError:
  log = server.command.log
  tail = ""
  if log is not None and log.exists():
    lines = log.read_text("utf-8", errors="replace").splitlines()[-15:]
    tail = "\n    | ".join(["", *lines])
  return errors.RolloutError(
    f"The {server.command.name} is not available.",
    where=f"{server.url}, log {log}",
    why=f"{why}{tail}",
    fix="Mend what its log reports. By hand it is started with\n    "
    + " ".join(server.command.argv),
  )


def _watch(
  trainer: subprocess.Popen[bytes],
  started: dict[Server, subprocess.Popen[bytes]],
  asked: Sequence[int],
  processes: _Processes,
) -> int:
  """Waits for training; passes signals on, and restarts servers.

  A server is started again when it ended, or says that its engine did.
  """
  num_passed, restarts, asked_last = 0, 0, time.monotonic()
  while (code := trainer.poll()) is None:
    for _ in asked[num_passed:]:
      num_passed += 1
      trainer.terminate()  # Asked twice, it does not wait for its step.
    is_time = time.monotonic() - asked_last > _CHECK_S
    for server, process in started.items():
      if process.poll() is None:
        if is_time and _is_lost(server):
          process.terminate()
      elif not asked and restarts < _MAX_RESTARTS:
        restarts += 1
        logging.error(
          "The %s ended with exit code %d; started again. Log: %s",
          *(server.command.name, process.returncode, server.command.log),
        )
        started[server] = processes.start_server(server.command)
    asked_last = time.monotonic() if is_time else asked_last
    time.sleep(_POLL_S)
  return code
