# SPDX-License-Identifier: Apache-2.0
"""A sampler whose work is done by rollout servers.

Prompts are cut into requests, and each goes to the server with the fewest
tokens outstanding. A server that fails is drained: its requests go to others
with their ids unchanged, and it gets no new ones until it is well again and
holds the weights last pushed.
"""

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
import contextlib
import dataclasses
import math
import os
import socket
import threading
import time
from typing import Any, Literal, Self, TypeVar
import uuid

from absl import logging

from atlas_jax import errors, types
from rollout import client, wire

_Result = TypeVar("_Result")

# More requests than this wait here, where they can still go to any server.
_MAX_REQUESTS = 8
# A request that fails on this many servers is not failed by the servers.
_MAX_MOVES = 8
_CONFLICT = 409
_PROBE_S = 1.0  # Between two looks at a server that is down.
_PROGRESS_S = 10.0  # Between two lines about what is waited for.


@dataclasses.dataclass(frozen=True)
class Channel:
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


@dataclasses.dataclass
class _Server:
  """One server as it is known here."""

  client: client.Client
  state: Literal["down", "updating", "ready"] = "down"
  version: int = 0
  max_model_len: int = 0
  failure: str = "not reached yet"
  num_requests: int = 0
  num_tokens: int = 0
  # Set while it is down, for whoever waits for its answers.
  lost: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
  # Held while it is shaken hands with, looked after or given weights.
  lock: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)


class HttpSampler:
  """Samples with rollout servers of one role. See `types.Sampler`.

  Several threads may use it at once. Close it, or use it in a `with`.
  """

  def __init__(
    self,
    urls: Sequence[str],
    *,
    channel: Channel,
    deadlines: client.Deadlines,
    token: str | None,
    publish: Callable[[Mapping[str, Any], int], str] | None,  # Any: see types.
    max_rows: int,
  ) -> None:
    """Waits until every server is up, and is what it should be.

    Args:
      urls: of the servers.
      channel: what is said to them.
      deadlines: of calls to one server.
      token: see `client.Client`.
      publish: writes weights and their version to where servers find them, and
        gives the digest of their manifest; None for a student, whose weights
        stay as they are.
      max_rows: completions in one request, unless one prompt has more.

    Raises:
      errors.ConfigError: if a server has another role or tokenizer.
      errors.RolloutError: if one is not up in time, or refuses the channel.
    """
    if not urls or (publish is None) != (channel.role == "student"):
      raise ValueError(
        f"Got {len(urls)} servers of role {channel.role}, publish={publish}."
      )
    self._channel, self._publish, self._max_rows = channel, publish, max_rows
    self._version = -1
    self._pushed: wire.UpdateRequest | None = None
    self._watchers: list[asyncio.Task[None]] = []
    self._init = wire.InitRequest(
      trainer_id=f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}",
      role=channel.role,
      tensors=[
        wire.TensorSignature(name=name, shape=list(shape))
        for name, shape in channel.tensors.items()
      ],
      tokenizer_digest=channel.tokenizer_digest,
      weights_root=channel.weights_root,
      heartbeat_s=channel.heartbeat_s,
    )
    self._servers = [
      _Server(client.Client(url, deadlines=deadlines, token=token))
      for url in urls
    ]
    self._changed = asyncio.Condition()
    self._none_since = time.monotonic()
    self._loop = asyncio.new_event_loop()
    self._thread = threading.Thread(
      target=self._loop.run_forever, name=f"{channel.role}-servers", daemon=True
    )
    self._thread.start()
    with contextlib.ExitStack() as unless_started:
      unless_started.callback(self.close)
      self._run(self._start())
      unless_started.pop_all()

  def __enter__(self) -> Self:
    """Gives itself."""
    return self

  def __exit__(self, *error: object) -> None:
    """Closes it."""
    self.close()

  @property
  def version(self) -> int:
    """The step whose weights the servers hold; -1 before a policy's first."""
    return self._version

  def sample(
    self, prompts: Sequence[types.Prompt], params: types.SamplingParams
  ) -> list[list[types.Completion]]:
    """Draws `params.group_size` completions for each prompt, in order.

    Raises:
      errors.ConfigError: if a prompt with its completion would not fit into
        the servers' context; nothing is sent then.
      errors.RolloutError: if there was no server for too long, or requests
        fail wherever they are sent.
    """
    return self._run(self._sample(prompts, params))

  def update_weights(
    self,
    params: Mapping[str, Any],  # Any: arrays and mappings of them.
    version: int,
  ) -> None:
    """Publishes weights and returns when no server samples with older ones.

    A server that cannot take them is drained, and gets them before it is used
    again.

    Raises:
      errors.DivergedError: if a weight is not finite; nothing changes then.
      errors.RolloutError: if no server takes them.
    """
    if self._publish is None:
      raise RuntimeError("A student's weights are never replaced.")
    start = time.monotonic()
    digest = self._publish(params, version)
    published_s = time.monotonic() - start
    request = wire.UpdateRequest(
      trainer_id=self._init.trainer_id, version=version, digest=digest
    )
    self._run(self._push(request))
    self._version = version
    logging.info(
      "Weights of version %d are with %d of %d servers: %.3f s to write, "
      "%.3f s to load.",
      version,
      sum(server.state == "ready" for server in self._servers),
      len(self._servers),
      published_s,
      time.monotonic() - start - published_s,
    )

  def close(self) -> None:
    """Gives the servers back; what is still running there is abandoned."""
    if self._loop.is_closed():
      return
    self._run(self._stop())
    self._loop.call_soon_threadsafe(self._loop.stop)
    self._thread.join()
    self._loop.close()

  def _run(self, work: Coroutine[Any, Any, _Result]) -> _Result:  # Any: unused.
    """Does work in the loop's thread, and waits for it."""
    future = asyncio.run_coroutine_threadsafe(work, self._loop)
    try:
      return future.result()
    finally:
      future.cancel()

  async def _start(self) -> None:
    for server in self._servers:
      await self._join(server, time.monotonic() + self._channel.wait_s)
    if self._channel.role == "student":
      self._version = self._servers[0].version
    self._watchers = [
      asyncio.create_task(self._watch(server)) for server in self._servers
    ]

  async def _stop(self) -> None:
    for watcher in self._watchers:
      watcher.cancel()
    await asyncio.gather(*self._watchers, return_exceptions=True)
    for server in self._servers:
      if server.state == "ready" and self._channel.role == "policy":
        try:
          await server.client.close_communicator(
            wire.CloseRequest(trainer_id=self._init.trainer_id)
          )
        except errors.RolloutError as error:
          logging.warning("%s was not told of the end: %s", *_told(error))
      await server.client.close()

  async def _join(self, server: _Server, deadline: float) -> None:
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
        left_s = deadline - said_at
        logging.info(
          "Waiting for %s, %.0f s more: %s",
          *(server.client.url, left_s, server.failure),
        )
      await asyncio.sleep(_PROBE_S)

  async def _admit(self, server: _Server) -> None:
    """Shakes hands with a server that is up, and gives it the last weights."""
    health = await server.client.health()
    self._check_is_meant(server, health)
    version = health.version
    if self._channel.role == "policy":
      # The answer tells what it holds: a push that seemed to fail may not have.
      held = await server.client.init_communicator(self._init)
      version = held.version
      if not self._is_current(held) and self._pushed is not None:
        await server.client.update_weights(self._pushed)
        version = self._pushed.version
    server.version, server.max_model_len = version, health.max_model_len
    server.state = "ready"
    server.lost.clear()
    logging.info(
      "%s is ready: %s of %s, version %d.",
      *(server.client.url, health.engine, health.model, version),
    )
    await self._notify()

  async def _watch(self, server: _Server) -> None:
    """Looks after a server for as long as this sampler lives."""
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
        await self._drain(server, error)

  async def _look(self, server: _Server) -> None:
    """Finds out if a server is well, and tells it that the trainer is."""
    await server.client.health()
    if self._channel.role == "policy":
      held = await server.client.init_communicator(self._init)
      if not self._is_current(held):
        raise client.UnavailableError(
          "A rollout server lost its weights.",
          where=server.client.url,
          why=f"It holds version {held.version}; it may have been restarted.",
          fix="It gets them again.",
        )

  def _is_current(self, held: wire.Version) -> bool:
    pushed = self._pushed
    return pushed is None or (
      (held.version, held.digest) == (pushed.version, pushed.digest)
    )

  async def _drain(self, server: _Server, error: errors.AtlasError) -> None:
    """Takes a server out of use; whoever waits for it goes elsewhere."""
    server.failure = error.why
    if server.state != "down":
      logging.warning("Lost %s: %s", *_told(error))
      server.state = "down"
      server.lost.set()
      if all(other.state == "down" for other in self._servers):
        self._none_since = time.monotonic()
    await self._notify()

  async def _notify(self) -> None:
    async with self._changed:
      self._changed.notify_all()

  async def _push(self, request: wire.UpdateRequest) -> None:
    """Has every server that is up load a version, all at once."""
    previous, self._pushed = self._pushed, request
    failures = await asyncio.gather(*map(self._update, self._servers))
    refusals = [e for e in failures if isinstance(e, client.RefusedError)]
    if refusals and not self._ready(math.inf):
      self._pushed = previous  # Which they still hold.
      raise refusals[0]
    await self._until(lambda: self._ready(math.inf))

  async def _update(self, server: _Server) -> errors.RolloutError | None:
    """Has one server load what was pushed; drains it if it does not."""
    async with server.lock:
      if server.state != "ready" or self._pushed is None:
        return None  # It gets them when it is back.
      server.state = "updating"
      try:
        await server.client.update_weights(self._pushed)
      except errors.RolloutError as error:
        await self._drain(server, error)
        return error
      server.version, server.state = self._pushed.version, "ready"
      await self._notify()
      return None

  async def _sample(
    self, prompts: Sequence[types.Prompt], params: types.SamplingParams
  ) -> list[list[types.Completion]]:
    """Cuts the prompts into requests, and puts the answers together."""
    if self._channel.role == "policy" and self._pushed is None:
      raise RuntimeError("Push weights before sampling from them.")
    self._check_fits(prompts, params.max_completion_tokens)
    size = min(
      max(1, self._max_rows // params.group_size),
      -(-len(prompts) // len(self._servers)),
    )
    starts = range(0, len(prompts), max(1, size))
    try:
      async with asyncio.TaskGroup() as tasks:
        parts = [
          tasks.create_task(self._request(prompts[i : i + size], params))
          for i in starts
        ]
    except BaseExceptionGroup as group:
      raise group.exceptions[0] from group
    return [group for part in parts for group in part.result()]

  async def _request(
    self, prompts: Sequence[types.Prompt], params: types.SamplingParams
  ) -> list[list[types.Completion]]:
    """Sends one request to one server after another, until one answers it."""
    name = uuid.uuid4().hex
    cost = sum(len(prompt.token_ids) for prompt in prompts)
    cost += len(prompts) * params.group_size * params.max_completion_tokens
    failures: list[str] = []
    while len(failures) < _MAX_MOVES:
      server = await self._until(lambda: self._ready(_MAX_REQUESTS))
      server.num_requests += 1
      server.num_tokens += cost
      request = _to_request(name, prompts, params, server.version)
      try:
        return _to_completions(await _unless_lost(server, request))
      except errors.RolloutError as error:
        failures.append(f"{server.client.url}: {error.why}")
        if isinstance(error, client.RefusedError) and error.status != _CONFLICT:
          raise
        # Weights replaced while the request was on its way are no failure.
        if server.version == request.version:
          await self._drain(server, error)
      finally:
        server.num_requests -= 1
        server.num_tokens -= cost
        await self._notify()
    raise errors.RolloutError(
      "Completions cannot be had from any rollout server.",
      where=f"{len(prompts)} prompts from row {prompts[0].row_id}",
      why="; ".join(failures),
      fix="Look into the servers' logs.",
    )

  def _ready(self, max_requests: float) -> _Server | None:
    """Finds the ready server with the fewest tokens outstanding."""
    ready = [
      server
      for server in self._servers
      if server.state == "ready" and server.num_requests < max_requests
    ]
    return min(ready, key=lambda server: server.num_tokens, default=None)

  async def _until(self, find: Callable[[], _Server | None]) -> _Server:
    """Waits until there is such a server, but not for long without any."""
    async with self._changed:
      while not (server := find()):
        left_s = None
        if all(other.state == "down" for other in self._servers):
          left_s = self._none_since + self._channel.wait_s - time.monotonic()
        try:
          async with asyncio.timeout(left_s):
            await self._changed.wait()
        except TimeoutError as error:
          raise self._no_server() from error
    return server

  def _no_server(self) -> errors.RolloutError:
    role = self._channel.role
    return errors.RolloutError(
      f"There is no rollout server for the {role}.",
      where=", ".join(server.client.url for server in self._servers),
      why=f"For {self._channel.wait_s:g} s: "
      + "; ".join(
        f"{server.client.url}: {server.failure}"
        for server in self._servers
        if server.state == "down"
      ),
      fix=f"Start it with python -m scripts.serve --role={role} --port=PORT "
      "--model=DIRECTORY, and run the same command again.",
    )

  def _check_is_meant(self, server: _Server, health: wire.Health) -> None:
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

  def _check_fits(self, prompts: Sequence[types.Prompt], max_new: int) -> None:
    limit = min(server.max_model_len for server in self._servers)
    for prompt in prompts:
      if not prompt.token_ids or len(prompt.token_ids) + max_new > limit:
        raise errors.ConfigError(
          f"A prompt of {len(prompt.token_ids)} tokens cannot be sampled.",
          where=f"row {prompt.row_id}",
          why=f"With {max_new} new tokens it needs 1 to {limit} positions, "
          "the max_model_len of the rollout servers.",
          fix="Shorten the prompt, lower max_completion_tokens, or start the "
          "servers with a larger --max_model_len.",
        )


def _may_pass(error: errors.RolloutError) -> bool:
  """Tells if waiting can help: not a refusal, unless for an old trainer."""
  # One that was killed is forgotten when its heartbeat has been missed.
  is_refusal = isinstance(error, client.RefusedError)
  return not is_refusal or error.error == "other_trainer"


async def _unless_lost(
  server: _Server, request: wire.GenerateRequest
) -> wire.GenerateResponse:
  """Waits for an answer only as long as the server is not drained."""
  call = asyncio.ensure_future(server.client.generate(request))
  lost = asyncio.ensure_future(server.lost.wait())
  try:
    await asyncio.wait({call, lost}, return_when=asyncio.FIRST_COMPLETED)
    if call.done():
      return call.result()
    raise client.UnavailableError(
      "A rollout server was lost.",
      where=server.client.url,
      why=server.failure,
      fix="Its work goes to others.",
    )
  finally:
    call.cancel()
    lost.cancel()


def _to_request(
  name: str,
  prompts: Sequence[types.Prompt],
  params: types.SamplingParams,
  version: int,
) -> wire.GenerateRequest:
  return wire.GenerateRequest(
    # Of other weights it is another request, with another answer.
    request_id=f"{name}-{version}",
    prompts=[
      wire.PromptIn(row_id=prompt.row_id, token_ids=list(prompt.token_ids))
      for prompt in prompts
    ],
    n=params.group_size,
    max_tokens=params.max_completion_tokens,
    temperature=params.temperature,
    top_p=params.top_p,
    top_k=params.top_k,
    seed=params.seed,
    version=version,
  )


def _to_completions(
  reply: wire.GenerateResponse,
) -> list[list[types.Completion]]:
  return [
    [
      types.Completion(
        token_ids=tuple(completion.token_ids),
        logprobs=tuple(completion.logprobs),
        model_logprobs=tuple(completion.model_logprobs or ()),
        finish_reason=completion.finish_reason,
        version=reply.version,
      )
      for completion in group
    ]
    for group in reply.completions
  ]


def _told(error: errors.AtlasError) -> tuple[str, str]:
  return error.where, error.why
