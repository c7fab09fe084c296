# SPDX-License-Identifier: Apache-2.0
"""Starts rollout servers, runs training next to them, and stops both.

Every process runs under `rollout.child_process`, so that all exit with the
launcher, even if it is killed. Training then receives SIGTERM and has
`TRAINING_GRACE_S` seconds to finish its step and save. Servers stop within
`SERVER_GRACE_S` seconds after training has exited.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import errno
import os
import pathlib
import signal
import subprocess
import sys
import time

from absl import logging
import httpx2
import pydantic

from atlas_jax import errors
from rollout import addresses, child_process, tokens, wire

SERVER_GRACE_S = 10.0
# For training to finish its step and save.
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
  """A command. `env` extends this process's; a value of "" unsets the name."""

  name: str
  argv: tuple[str, ...]
  env: Mapping[str, str]
  log: pathlib.Path | None  # None: the terminal.
  grace_s: float


@dataclasses.dataclass(frozen=True, eq=False)
class Server:
  """A rollout server to start."""

  role: wire.Role
  url: str
  command: Command


def is_guarded() -> bool:
  """Returns whether this process was started by a launcher."""
  return _GUARDED in os.environ


def check_ports(host: str, base: int, count: int) -> None:
  """Validates that all ports are free.

  Raises:
    errors.ConfigError: if `host` is not an address of this machine, or a port
      is in use; suggests a base with free ports.
  """
  in_use = [p for p in range(base, base + count) if not _is_free(host, p)]
  if not in_use:
    return
  starts = range(base + count, 65536 - count, count)
  free = next(
    s for s in starts if all(_is_free(host, s + i) for i in range(count))
  )
  raise errors.ConfigError(
    f"Port {in_use[0]} is in use.",
    where=f"vllm_port={base}, with {count} servers",
    why=f"Another process listens on {addresses.url(host, in_use[0])}.",
    fix=f"Stop it, or set vllm_port={free}.",
  )


def _is_free(host: str, port: int) -> bool:
  try:
    addresses.bind(host, port).close()
  except OSError as error:
    if error.errno in (errno.EADDRINUSE, errno.EACCES):
      return False
    raise errors.ConfigError(
      f"vllm_host must be an address of this machine, got {host}.",
      where=f"vllm_host={host}",
      why=str(error),
      fix="Leave it out to start servers here. For servers that run elsewhere, "
      "use scripts/launch.sh.",
    ) from error
  return True


def run(
  servers: Sequence[Server], training: Command, *, max_wait_s: float
) -> int:
  """Starts the servers, then runs `training` until it exits.

  On the first SIGINT, SIGTERM, SIGHUP or SIGUSR1 training has
  `TRAINING_GRACE_S` to finish its step and save; on a second one it stops
  without finishing its step. The servers run until training has exited.

  Returns:
    The exit code of `training`.

  Raises:
    errors.RolloutError: if a server exits or is not healthy in time.
    errors.PreemptedError: if stopped before training started.
    errors.LostProcessError: if training was aborted (SIGABRT).
    errors.AtlasError: if training was killed by another signal.
  """
  with _signals() as received, _Processes() as processes:
    started = {
      server: processes.start_server(server.command) for server in servers
    }
    _wait_healthy(started, received, max_wait_s)
    trainer = processes.start_training(training)
    code = _watch(trainer, started, received, processes)
  # The child process was stopped before it could forward the signal.
  if received and code == -signal.SIGTERM:
    raise _stopped(received[0])
  if code < 0 or code >= child_process.SIGNALLED:
    name = signal.Signals(
      -code if code < 0 else code - child_process.SIGNALLED
    ).name
    if name == "SIGABRT":
      raise errors.LostProcessError(
        f"{training.name} was aborted by its own libraries.",
        where=" ".join(training.argv),
        why="See the lines above. JAX aborts every process of a multi-process "
        "job when one is lost or never connects.",
        fix="Look for the cause at the end of the other processes' logs. Then "
        "run the same command again: it resumes from the last checkpoint.",
      )
    raise errors.AtlasError(
      f"{training.name} was killed by {name}.",
      where=" ".join(training.argv),
      why="It was killed manually, it did not save within the grace period "
      "after a stop signal, or the machine ran out of memory.",
      fix="Run the same command again: it resumes from the last checkpoint.",
    )
  return code


class _Processes:
  """The processes of one launch; leaving the context stops them all.

  Each `rollout.child_process` watches the read end of a pipe. This process
  holds both write ends. Training's child process also holds that of the
  servers, so they run until training has saved:

    launcher --training pipe--> child_process of training
    launcher and child_process of training --server pipe--> those of servers
  """

  def __init__(self) -> None:
    self._guarded: list[tuple[Command, subprocess.Popen[bytes]]] = []
    self._of_training, self._of_servers = os.pipe(), os.pipe()

  def __enter__(self) -> "_Processes":
    return self

  def start_server(self, command: Command) -> subprocess.Popen[bytes]:
    """Starts a server, which stops after training."""
    return self._start(command, self._of_servers[0], ())

  def start_training(self, command: Command) -> subprocess.Popen[bytes]:
    """Starts training, which stops with this process."""
    return self._start(command, self._of_training[0], self._of_servers[1:])

  def _start(
    self, command: Command, watched: int, held: Sequence[int]
  ) -> subprocess.Popen[bytes]:
    """Starts a command under `rollout.child_process`.

    The child process forwards signals and returns the command's exit code.
    """
    env = {**os.environ, _GUARDED: "1", **command.env}
    env = {k: v for k, v in env.items() if v}
    with contextlib.ExitStack() as stack:
      output = None
      if command.log is not None:
        command.log.parent.mkdir(parents=True, exist_ok=True)
        output = stack.enter_context(command.log.open("ab"))
      # In a new session the terminal's Ctrl-C reaches only this process, which
      # forwards it.
      process = subprocess.Popen(
        [
          sys.executable,
          "-m",
          "rollout.child_process",
          str(watched),
          str(command.grace_s),
          *command.argv,
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
    # Signals all processes first, then waits for them.
    for _, process in self._guarded:
      process.terminate()
    for end in (*self._of_training, *self._of_servers):
      os.close(end)
    for command, process in self._guarded:
      try:
        process.wait(command.grace_s + _PROBE_S)
      except subprocess.TimeoutExpired:
        logging.error("%s did not exit, pid=%d.", command.name, process.pid)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
  """Yields a list that collects signals, so that they do not interrupt us."""
  received: list[int] = []
  old = {n: signal.signal(n, lambda n, _: received.append(n)) for n in _SIGNALS}
  try:
    yield received
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)


def _wait_healthy(
  started: Mapping[Server, subprocess.Popen[bytes]],
  received: Sequence[int],
  max_wait_s: float,
) -> None:
  """Waits until every server reports that it is healthy."""
  waiting = {server: "not polled yet" for server in started}
  begun = logged = time.monotonic()
  while waiting:
    for server in list(waiting):
      if received:
        raise _stopped(received[0])
      if started[server].poll() is not None:
        code = started[server].returncode
        raise _unavailable(server, f"It exited with code {code}.")
      waiting[server] = _problem(server)
      if not waiting[server]:
        del waiting[server]
        logging.info("The %s is ready.", server.command.name)
    now = time.monotonic()
    for server, problem in waiting.items():
      if now - begun > max_wait_s:
        why = f"It was not healthy within {max_wait_s:.0f} s: {problem}."
        raise _unavailable(server, why)
      if now - logged > _PROGRESS_S:
        logging.info(
          "The %s: starting, %.0f s (limit %.0f s; %s). Log: %s",
          server.command.name,
          now - begun,
          max_wait_s,
          problem,
          server.command.log,
        )
    logged = now if now - logged > _PROGRESS_S else logged
    time.sleep(_POLL_S)


def _stopped(number: int) -> errors.PreemptedError:
  return errors.PreemptedError(
    f"Stopped by {signal.Signals(number).name}.",
    where="launcher",
    why="The signal arrived before training started.",
    fix="Run the same command again.",
  )


async def _poll_health(server: Server) -> wire.Health | str:
  """Returns a server's health, or why it is unknown."""
  token = tokens.of_environment({**os.environ, **server.command.env})
  headers = {"Authorization": f"Bearer {token}"} if token else {}
  try:
    # httpx2's timeout applies to each read, not to the whole request.
    async with (
      asyncio.timeout(_PROBE_S),
      # A proxy of the environment would see the token.
      httpx2.AsyncClient(trust_env=False) as client,
    ):
      reply = await client.get(f"{server.url}/health", headers=headers)
    return wire.Health.model_validate_json(reply.content)
  except TimeoutError:
    return f"no response within {_PROBE_S:.0f} s"
  except httpx2.HTTPError as error:
    return str(error) or type(error).__name__
  except pydantic.ValidationError:
    return "the response is not from a rollout server"


def _problem(server: Server) -> str:
  """Returns why a server is not healthy, or ""."""
  health = asyncio.run(_poll_health(server))
  if isinstance(health, str):
    return health
  if (health.status, health.role) != ("ok", server.role):
    return f"role={health.role}, status={health.status}"
  return ""


def _is_lost(server: Server) -> bool:
  """Returns whether a server reports that its engine is dead or hung."""
  health = asyncio.run(_poll_health(server))
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
    fix="Fix what its log reports. To start it manually:\n    "
    + " ".join(server.command.argv),
  )


def _watch(
  trainer: subprocess.Popen[bytes],
  started: dict[Server, subprocess.Popen[bytes]],
  received: Sequence[int],
  processes: _Processes,
) -> int:
  """Waits for training; forwards signals and restarts servers.

  A server is restarted when it exits, or reports that its engine is dead or
  hung.
  """
  num_passed, restarts, checked_at = 0, 0, time.monotonic()
  while (code := trainer.poll()) is None:
    for _ in received[num_passed:]:
      num_passed += 1
      trainer.terminate()  # The second one stops it in the middle of a step.
    is_due = time.monotonic() - checked_at > _CHECK_S
    for server, process in started.items():
      if process.poll() is None:
        if is_due and _is_lost(server):
          process.terminate()
      elif not received and restarts < _MAX_RESTARTS:
        restarts += 1
        logging.error(
          "Restarting the %s: it exited with code %d. Log: %s",
          server.command.name,
          process.returncode,
          server.command.log,
        )
        started[server] = processes.start_server(server.command)
    checked_at = time.monotonic() if is_due else checked_at
    time.sleep(_POLL_S)
  return code
