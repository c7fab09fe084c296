# SPDX-License-Identifier: Apache-2.0
"""Tracks the state and the weights of the rollout servers of one role.

A server that fails is drained. It gets requests again once it is healthy, holds
the last pushed weights and has generated a token with them.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import math
import os
import socket
import time
from typing import Literal
import uuid

from absl import logging

from atlas_jax import errors
from rollout import process_name, wire
from rollout.remote import client

_PROBE_S = 1.0  # Interval between attempts to reach a server that is down.
_PROGRESS_S = 10.0  # Interval between log lines while waiting.


@dataclasses.dataclass(frozen=True)
class ChannelTerms:
  """Terms of the weight channel, which the servers must match.

  `tensors` maps the model's Hugging Face names to shapes. A server closes the
  channel after `heartbeat_s` without a heartbeat. `wait_s` is how long the
  trainer waits while no server is available, at the start and later.
  """

  role: wire.Role
  tensors: Mapping[str, tuple[int, ...]]
  tokenizer_digest: str
  weights_root: str
  heartbeat_s: float
  wait_s: float


@dataclasses.dataclass(eq=False)
class Server:
  """The trainer's view of one server."""

  client: client.Client
  state: Literal["down", "updating", "ready"] = "down"
  version: int = 0
  loaded: wire.UpdateRequest | None = None  # The last push that it loaded.
  max_model_len: int = 0
  failure: str = "not reached yet"
  num_rows: int = 0  # Outstanding completions.
  num_tokens: int = 0
  # Request id of the probe it must answer after a failure; "" if none.
  probe_id: str = ""
  # Set while it is down, to cancel pending requests.
  lost: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
  # Held during the handshake, health checks and weight updates.
  lock: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)


class Fleet:
  """Monitors the servers of one role. Use it from a single event loop."""

  def __init__(
    self,
    urls: Sequence[str],
    channel: ChannelTerms,
    *,
    deadlines: client.Deadlines,
    token: str | None,
  ) -> None:
    """Creates the clients; see `http_sampler.HttpSampler` for the arguments."""
    self.servers = [
      Server(client.Client(url, deadlines=deadlines, token=token))
      for url in urls
    ]
    self.pushed: wire.UpdateRequest | None = None
    self._channel = channel
    self._init = wire.InitRequest(
      trainer_id=f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}",
      process=process_name.this_process(),
      role=channel.role,
      tensors=[
        wire.TensorSignature(name=name, shape=list(shape))
        for name, shape in channel.tensors.items()
      ],
      tokenizer_digest=channel.tokenizer_digest,
      weights_root=channel.weights_root,
      heartbeat_s=channel.heartbeat_s,
    )
    self._changed = asyncio.Condition()
    self._none_since = time.monotonic()
    self._watchers: list[asyncio.Task[None]] = []

  @property
  def num_ready(self) -> int:
    """The number of servers that accept requests."""
    return sum(server.state == "ready" for server in self.servers)

  async def start(self) -> None:
    """Waits until every server is ready, then starts monitoring them.

    Raises:
      errors.ConfigError: if a server has another role or tokenizer.
      errors.RolloutError: if a server is not healthy in time, or rejects the
        weight channel.
    """
    deadline = time.monotonic() + self._channel.wait_s
    for server in self.servers:
      await self._join(server, deadline)
    self._watchers = [
      asyncio.create_task(self._watch(server)) for server in self.servers
    ]

  async def stop(self) -> None:
    """Closes the weight channels and the connections."""
    for watcher in self._watchers:
      watcher.cancel()
    await asyncio.gather(*self._watchers, return_exceptions=True)
    for server in self.servers:
      if server.state == "ready" and self._channel.role == "policy":
        try:
          await server.client.close_communicator(
            wire.CloseRequest(trainer_id=self._init.trainer_id)
          )
        except errors.RolloutError as error:
          logging.warning(
            "Cannot close the weight channel of %s: %s", error.where, error.why
          )
      await server.client.close()

  async def push(self, version: int, digest: str) -> list[wire.UpdateResponse]:
    """Loads a version on all ready servers concurrently.

    Returns:
      The responses of the servers that loaded it.

    Raises:
      errors.RolloutError: if no server loads it.
    """
    request = wire.UpdateRequest(
      trainer_id=self._init.trainer_id, version=version, digest=digest
    )
    previous, self.pushed = self.pushed, request
    replies = await asyncio.gather(
      *(self._update(server, request) for server in self.servers)
    )
    refusals = [r for r in replies if isinstance(r, client.RefusedError)]
    if refusals and not self.ready(math.inf):
      self.pushed = previous  # The servers still hold this version.
      raise refusals[0]
    await self.wait_for(lambda: self.ready(math.inf))
    return [r for r in replies if isinstance(r, wire.UpdateResponse)]

  def ready(
    self, max_rows: float, avoid: Sequence[Server] = ()
  ) -> Server | None:
    """Returns the ready server with the fewest outstanding tokens, or None.

    Servers in `avoid` are used only if no other is ready.
    """
    ready = [
      server
      for server in self.servers
      if server.state == "ready" and server.num_rows < max_rows
    ]
    others = [server for server in ready if server not in avoid]
    return min(
      others or ready, key=lambda server: server.num_tokens, default=None
    )

  async def wait_for(self, find: Callable[[], Server | None]) -> Server:
    """Waits until `find` returns a server.

    Raises:
      errors.RolloutError: if all servers were down for `wait_s`.
    """
    async with self._changed:
      while not (server := find()):
        left_s = None
        if all(other.state == "down" for other in self.servers):
          left_s = self._none_since + self._channel.wait_s - time.monotonic()
        try:
          async with asyncio.timeout(left_s):
            await self._changed.wait()
        except TimeoutError as error:
          raise self._no_server() from error
    return server

  async def notify(self) -> None:
    """Wakes all callers of `wait_for` after a server's state changed."""
    async with self._changed:
      self._changed.notify_all()

  async def drain(self, server: Server, error: errors.AtlasError) -> None:
    """Marks a server as down; its pending requests move to other servers."""
    server.failure = error.why
    if server.state != "down":
      logging.warning("Lost %s: %s", error.where, error.why)
      server.state, server.probe_id = "down", f"probe-{uuid.uuid4().hex}"
      server.lost.set()
      if all(other.state == "down" for other in self.servers):
        self._none_since = time.monotonic()
    await self.notify()

  async def doubt(self, server: Server) -> None:
    """Probes a server after a timeout, and drains it if the probe fails."""
    async with server.lock:
      if server.state == "ready":
        try:
          await server.client.probe(f"probe-{uuid.uuid4().hex}", server.version)
        except errors.RolloutError as error:
          await self.drain(server, error)

  async def _join(self, server: Server, deadline: float) -> None:
    """Waits until a server is ready for the first time."""
    logged_at = time.monotonic()
    while True:
      try:
        await self._admit(server)
      except errors.RolloutError as error:
        if not _is_retryable(error):
          raise
        server.failure = error.why
        if time.monotonic() > deadline:
          raise self._no_server() from error
      else:
        return
      if time.monotonic() - logged_at > _PROGRESS_S:
        logged_at = time.monotonic()
        logging.info(
          "Waiting for %s, %.0f s more: %s",
          server.client.url,
          deadline - logged_at,
          server.failure,
        )
      await asyncio.sleep(_PROBE_S)

  async def _admit(self, server: Server) -> None:
    """Performs the handshake with a server and pushes the last weights."""
    health = await server.client.health()
    self._check_identity(server, health)
    version, pushed = health.version, self.pushed
    if self._channel.role == "policy":
      # The response contains the loaded version: a push whose answer was lost
      # may have succeeded.
      held = await server.client.init_communicator(self._init)
      version = held.version
      if held.loading is not None:
        raise _outdated(server, f"It is still loading version {held.loading}.")
      if pushed is not None and not _is_held(pushed, held):
        await server.client.update_weights(pushed)
        version = pushed.version
      if self.pushed is not pushed:
        raise _outdated(server, "The push changed while it loaded weights.")
    if server.probe_id:
      # The same id each time, so that retries join a slow first probe.
      await server.client.probe(f"{server.probe_id}-{version}", version)
    server.version, server.max_model_len = version, health.max_model_len
    server.loaded = pushed
    server.state, server.probe_id = "ready", ""
    server.lost.clear()
    logging.info(
      "Server %s is ready: engine=%s model=%s version=%d.",
      server.client.url,
      health.engine,
      health.model,
      version,
    )
    await self.notify()

  async def _watch(self, server: Server) -> None:
    """Monitors a server until the fleet is stopped."""
    while True:
      if server.state == "down":
        await asyncio.sleep(_PROBE_S)
      else:
        with contextlib.suppress(TimeoutError):
          async with asyncio.timeout(self._channel.heartbeat_s / 4):
            await server.lost.wait()
      try:
        async with server.lock:
          if server.state == "down":
            await self._admit(server)
          else:
            await self._check(server)
      except errors.AtlasError as error:
        await self.drain(server, error)

  async def _check(self, server: Server) -> None:
    """Checks a server's health and sends the trainer's heartbeat."""
    await server.client.health()
    if self._channel.role == "policy":
      held = await server.client.init_communicator(self._init)
      # Compared with what this server loaded, not with the last push, which
      # may still be on its way.
      if server.loaded is not None and not _is_held(server.loaded, held):
        raise _outdated(
          server,
          f"It holds version {held.version}; it may have been restarted.",
        )

  async def _update(
    self, server: Server, request: wire.UpdateRequest
  ) -> wire.UpdateResponse | errors.RolloutError | None:
    """Loads a push on one server; drains the server if that fails."""
    async with server.lock:
      if server.state != "ready":
        return None  # `_admit` pushes the weights once it is back.
      server.state = "updating"
      try:
        reply = await server.client.update_weights(request)
      except errors.RolloutError as error:
        await self.drain(server, error)
        return error
      server.loaded, server.version = request, request.version
      server.state = "ready"
      await self.notify()
      return reply

  def _no_server(self) -> errors.RolloutError:
    role = self._channel.role
    return errors.RolloutError(
      f"No rollout server is available for the {role}.",
      where=", ".join(server.client.url for server in self.servers),
      why=f"All were down for {self._channel.wait_s:g} s. "
      + "; ".join(
        f"{server.client.url}: {server.failure}"
        for server in self.servers
        if server.state == "down"
      ),
      fix=f"Start servers with python -m scripts.serve --role={role} "
      "--port=PORT --model=DIRECTORY, then run the same command again.",
    )

  def _check_identity(self, server: Server, health: wire.Health) -> None:
    for what, theirs, ours in (
      ("role", health.role, self._channel.role),
      ("tokenizer", health.tokenizer_digest, self._channel.tokenizer_digest),
    ):
      if theirs != ours:
        raise errors.ConfigError(
          f"A rollout server has the wrong {what}.",
          where=server.client.url,
          why=f"Got {theirs[:12]!r}, expected {ours[:12]!r}.",
          fix="Check the addresses of each role, and that server and trainer "
          "use the same model directory.",
        )


def _is_held(pushed: wire.UpdateRequest, held: wire.Version) -> bool:
  return (held.version, held.digest) == (pushed.version, pushed.digest)


def _is_retryable(error: errors.RolloutError) -> bool:
  """Returns whether retrying can help: for all errors but most rejections."""
  # A channel held by a killed trainer is released: immediately by servers on
  # its machine, by others when its heartbeat expires.
  is_refusal = isinstance(error, client.RefusedError)
  return not is_refusal or error.error == "other_trainer"


def _outdated(server: Server, why: str) -> client.UnavailableError:
  return client.UnavailableError(
    "A rollout server does not hold the last pushed weights.",
    where=server.client.url,
    why=why,
    fix="None needed: it is checked again, and the weights are pushed again.",
  )
