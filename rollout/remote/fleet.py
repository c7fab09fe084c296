# SPDX-License-Identifier: Apache-2.0
"""The rollout servers of one role: which are well, and what they hold.

A server that fails is drained, and gets no work until it is well again, holds
the weights last pushed and has written a token with them.
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

_PROBE_S = 1.0  # Between two looks at a server that is down.
_PROGRESS_S = 10.0  # Between two lines about what is waited for.


@dataclasses.dataclass(frozen=True)
class ChannelTerms:
  """What servers are told of the trainer, and held to.

  `tensors` are the model's, by their Hugging Face names. A trainer that is not
  heard of for `heartbeat_s` loses its servers. `wait_s` is how long to go on
  without any server, at the start and later.
  """

  role: wire.Role
  tensors: Mapping[str, tuple[int, ...]]
  tokenizer_digest: str
  weights_root: str
  heartbeat_s: float
  wait_s: float


@dataclasses.dataclass(eq=False)
class Server:
  """One server as it is known here."""

  client: client.Client
  state: Literal["down", "updating", "ready"] = "down"
  version: int = 0
  loaded: wire.UpdateRequest | None = None  # Of all that was pushed, by it.
  max_model_len: int = 0
  failure: str = "not reached yet"
  num_requests: int = 0
  num_tokens: int = 0
  # Of the tiny generation which it owes since it was lost; "" if none.
  probe_id: str = ""
  # Set while it is down, for whoever waits for its answers.
  lost: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
  # Held while it is shaken hands with, looked after or given weights.
  lock: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)


class Fleet:
  """The servers of one role, looked after. Belongs to one event loop."""

  def __init__(
    self,
    urls: Sequence[str],
    channel: ChannelTerms,
    *,
    deadlines: client.Deadlines,
    token: str | None,
  ) -> None:
    """Reaches nobody yet; see `http_sampler.HttpSampler` for the arguments."""
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
    """How many servers can be sampled from."""
    return sum(server.state == "ready" for server in self.servers)

  async def start(self) -> None:
    """Waits until every server is ready, then looks after them.

    Raises:
      errors.ConfigError: if a server has another role or tokenizer.
      errors.RolloutError: if one is not up in time, or refuses the channel.
    """
    deadline = time.monotonic() + self._channel.wait_s
    for server in self.servers:
      await self._join(server, deadline)
    self._watchers = [
      asyncio.create_task(self._watch(server)) for server in self.servers
    ]

  async def stop(self) -> None:
    """Gives the servers back."""
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
          logging.warning("%s was not told of the end: %s", *_told(error))
      await server.client.close()

  async def push(self, version: int, digest: str) -> list[wire.UpdateResponse]:
    """Has every server that is up load a version, all at once.

    Returns:
      What those that did said of it.

    Raises:
      errors.RolloutError: if none does.
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
      self.pushed = previous  # Which they still hold.
      raise refusals[0]
    await self.wait_for(lambda: self.ready(math.inf))
    return [r for r in replies if isinstance(r, wire.UpdateResponse)]

  def ready(
    self, max_requests: float, avoid: Sequence[Server] = ()
  ) -> Server | None:
    """Finds the ready server with the fewest tokens outstanding.

    One of `avoid` is given only if there is no other.
    """
    ready = [
      server
      for server in self.servers
      if server.state == "ready" and server.num_requests < max_requests
    ]
    others = [server for server in ready if server not in avoid]
    return min(
      others or ready, key=lambda server: server.num_tokens, default=None
    )

  async def wait_for(self, find: Callable[[], Server | None]) -> Server:
    """Waits until there is such a server, but not for long without any.

    Raises:
      errors.RolloutError: if all of them were down for too long.
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
    """Wakes those who wait for a server: one of them may have changed."""
    async with self._changed:
      self._changed.notify_all()

  async def drain(self, server: Server, error: errors.AtlasError) -> None:
    """Takes a server out of use; whoever waits for it goes elsewhere."""
    server.failure = error.why
    if server.state != "down":
      logging.warning("Lost %s: %s", *_told(error))
      server.state, server.probe_id = "down", f"probe-{uuid.uuid4().hex}"
      server.lost.set()
      if all(other.state == "down" for other in self.servers):
        self._none_since = time.monotonic()
    await self.notify()

  async def doubt(self, server: Server) -> None:
    """Has a server that was late write a token, and drains it if it fails."""
    async with server.lock:
      if server.state == "ready":
        try:
          await server.client.probe(f"probe-{uuid.uuid4().hex}", server.version)
        except errors.RolloutError as error:
          await self.drain(server, error)

  async def _join(self, server: Server, deadline: float) -> None:
    """Waits until a server is ready for the first time."""
    said_at = time.monotonic()
    while True:
      try:
        await self._admit(server)
      except errors.RolloutError as error:
        if not _may_pass(error):
          raise
        server.failure = error.why
        if time.monotonic() > deadline:
          raise self._no_server() from error
      else:
        return
      if time.monotonic() - said_at > _PROGRESS_S:
        said_at = time.monotonic()
        logging.info(
          "Waiting for %s, %.0f s more: %s",
          *(server.client.url, deadline - said_at, server.failure),
        )
      await asyncio.sleep(_PROBE_S)

  async def _admit(self, server: Server) -> None:
    """Shakes hands with a server that is up, and gives it the last weights."""
    health = await server.client.health()
    self._check_is_meant(server, health)
    version, pushed = health.version, self.pushed
    if self._channel.role == "policy":
      # The answer tells what it holds: a push that seemed to fail may not have.
      held = await server.client.init_communicator(self._init)
      version = held.version
      if held.loading is not None:
        raise _unwell(server, f"It is still loading version {held.loading}.")
      if pushed is not None and not _is_held(pushed, held):
        await server.client.update_weights(pushed)
        version = pushed.version
    if server.probe_id:
      # The same id each time: one that is slow at first is not asked anew.
      await server.client.probe(f"{server.probe_id}-{version}", version)
    server.version, server.max_model_len = version, health.max_model_len
    server.loaded = pushed
    server.state, server.probe_id = "ready", ""
    server.lost.clear()
    logging.info(
      "%s is ready: %s of %s, version %d.",
      *(server.client.url, health.engine, health.model, version),
    )
    await self.notify()

  async def _watch(self, server: Server) -> None:
    """Looks after a server for as long as the fleet is used."""
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
            await self._look(server)
      except errors.AtlasError as error:
        await self.drain(server, error)

  async def _look(self, server: Server) -> None:
    """Finds out if a server is well, and tells it that the trainer is."""
    await server.client.health()
    if self._channel.role == "policy":
      held = await server.client.init_communicator(self._init)
      # What was pushed last may not have come to it yet.
      if server.loaded is not None and not _is_held(server.loaded, held):
        raise _unwell(
          server,
          f"It holds version {held.version}; it may have been restarted.",
        )

  async def _update(
    self, server: Server, request: wire.UpdateRequest
  ) -> wire.UpdateResponse | errors.RolloutError | None:
    """Has one server load what was pushed; drains it if it does not."""
    async with server.lock:
      if server.state != "ready":
        return None  # It gets them when it is back.
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
      f"There is no rollout server for the {role}.",
      where=", ".join(server.client.url for server in self.servers),
      why=f"For {self._channel.wait_s:g} s: "
      + "; ".join(
        f"{server.client.url}: {server.failure}"
        for server in self.servers
        if server.state == "down"
      ),
      fix=f"Start it with python -m scripts.serve --role={role} --port=PORT "
      "--model=DIRECTORY, and run the same command again.",
    )

  def _check_is_meant(self, server: Server, health: wire.Health) -> None:
    for what, theirs, ours in (
      ("role", health.role, self._channel.role),
      ("tokenizer", health.tokenizer_digest, self._channel.tokenizer_digest),
    ):
      if theirs != ours:
        raise errors.ConfigError(
          f"A rollout server has another {what}.",
          where=server.client.url,
          why=f"It has {theirs[:12]!r}, the trainer {ours[:12]!r}.",
          fix="Check which address is whose, and that both sides were given "
          "the same model directory.",
        )


def _is_held(pushed: wire.UpdateRequest, held: wire.Version) -> bool:
  return (held.version, held.digest) == (pushed.version, pushed.digest)


def _may_pass(error: errors.RolloutError) -> bool:
  """Tells if waiting can help: not a refusal, unless for an old trainer."""
  # One that was killed is forgotten: at once by servers of its machine, by
  # others when its heartbeat has been missed.
  is_refusal = isinstance(error, client.RefusedError)
  return not is_refusal or error.error == "other_trainer"


def _unwell(server: Server, why: str) -> client.UnavailableError:
  return client.UnavailableError(
    "A rollout server does not hold the weights it should.",
    where=server.client.url,
    why=why,
    fix="It is asked again, and gets them if it needs them.",
  )


def _told(error: errors.AtlasError) -> tuple[str, str]:
  return error.where, error.why
