# SPDX-License-Identifier: Apache-2.0
"""A sampler that distributes prompts over rollout servers.

Prompts are split into requests, and each goes to the server with the fewest
outstanding tokens. If a server fails, its requests move to other servers with
the same ids. A request that times out is retried elsewhere, the last time
prompt by prompt; a prompt that times out again is dropped.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
import contextlib
import math
import threading
import time
from typing import Any, Self, TypeVar
import uuid

from absl import logging

from atlas_jax import errors, types
from rollout import context_length, counters, wire
from rollout.remote import client, fleet

_Result = TypeVar("_Result")
# Writes weights and their version where servers can load them; returns the
# digest of the manifest.
Publish = Callable[[Mapping[str, Any], int], str]  # Any: see types.

# Requests of `max_rows` completions per server. Others wait here, where any
# server can still take them.
_MAX_REQUESTS = 8
# After this many failures the request itself is assumed to be the cause.
_MAX_MOVES = 8
# After this many timeouts the prompt is dropped.
_MAX_LATE = 3
_CONFLICT = 409
# Tokens of a request's prompts; half of the limit, for the other fields.
_MAX_TOKENS = wire.MAX_COMMAS // 2


class HttpSampler:
  """Samples with the rollout servers of one role. See `types.Sampler`.

  Thread-safe. Close it, or use it as a context manager.
  """

  def __init__(
    self,
    urls: Sequence[str],
    *,
    channel: fleet.ChannelTerms,
    deadlines: client.Deadlines,
    token: str | None,
    publish: Publish | None,
    max_rows: int,
  ) -> None:
    """Waits until every server is healthy and matches the channel terms.

    Args:
      urls: addresses of the servers.
      channel: terms of the weight channel.
      deadlines: limits of calls to one server.
      token: see `client.Client`.
      publish: writes new weights; None for a student, whose weights are fixed.
      max_rows: maximum completions per request, unless one prompt has more.

    Raises:
      errors.ConfigError: if a server has another role or tokenizer.
      errors.RolloutError: if a server is not healthy in time, or rejects the
        weight channel.
    """
    if not urls or (publish is None) != (channel.role == "student"):
      raise ValueError(
        "Expected at least one server, and publish for the policy only, got "
        f"{len(urls)} servers of role {channel.role}, publish={publish}."
      )
    self._publish, self._max_rows = publish, max_rows
    self._version = -1
    self._counters = counters.Counters()
    self._loop = asyncio.new_event_loop()
    self._fleet = fleet.Fleet(urls, channel, deadlines=deadlines, token=token)
    self._thread = threading.Thread(
      target=self._loop.run_forever, name=f"{channel.role}-servers", daemon=True
    )
    self._thread.start()
    with contextlib.ExitStack() as unless_started:
      unless_started.callback(self.close)
      self._run(self._fleet.start())
      unless_started.pop_all()
    if publish is None:
      self._version = self._fleet.servers[0].version

  def __enter__(self) -> Self:
    """Returns itself."""
    return self

  def __exit__(self, *error: object) -> None:
    """Closes it."""
    self.close()

  @property
  def version(self) -> int:
    """The step of the loaded weights; -1 before the policy's first update."""
    return self._version

  @property
  def context_length(self) -> int:
    """The smallest max_model_len of the servers."""
    return min(server.max_model_len for server in self._fleet.servers)

  @property
  def is_concurrent(self) -> bool:
    """True: requests of several threads are sent at the same time."""
    return True

  def sample(
    self, prompts: Sequence[types.Prompt], params: types.SamplingParams
  ) -> list[list[types.Completion]]:
    """Samples `params.group_size` completions per prompt, in prompt order.

    The list is empty for a prompt that timed out on every server it was sent
    to.

    Raises:
      errors.ConfigError: if a prompt plus its completion exceeds the servers'
        context length; nothing is sent then.
      errors.RolloutError: if no server was available for too long, or a request
        fails on every server.
    """
    started = time.monotonic()
    groups = self._run(self._sample(prompts, params))
    self._counters.add(
      tokens=sum(len(c.token_ids) for group in groups for c in group),
      sample_s=time.monotonic() - started,
    )
    return groups

  def update_weights(
    self,
    params: Mapping[str, Any],  # Any: arrays and mappings of them.
    version: int,
  ) -> None:
    """Publishes weights and returns once no server samples with older ones.

    A server that fails to load them is drained, and loads them before it is
    used again.

    Raises:
      errors.DivergedError: if a weight is not finite; nothing changes then.
      errors.RolloutError: if no server loads them.
    """
    if self._publish is None:
      raise RuntimeError("A student's weights are never replaced.")
    start = time.monotonic()
    digest = self._publish(params, version)
    published_s = time.monotonic() - start
    replies = self._run(self._fleet.push(version, digest))
    self._version = version
    # Servers load concurrently, so the slowest one determines the time.
    drain_s = max((reply.drain_s for reply in replies), default=0.0)
    load_s = max((reply.load_s for reply in replies), default=0.0)
    push_s = time.monotonic() - start
    self._counters.add(
      push_s=push_s, publish_s=published_s, drain_s=drain_s, load_s=load_s
    )
    logging.info(
      "Pushed weights version=%d to %d of %d servers in %.3f s: write %.3f s, "
      "drain %.3f s, load %.3f s.",
      version,
      self._fleet.num_ready,
      len(self._fleet.servers),
      push_s,
      published_s,
      drain_s,
      load_s,
    )

  def take_metrics(self) -> Mapping[str, float]:
    """Returns metrics since the last call.

    `queue_s` is the mean time a request waited for a free server and in the
    server's queue; the other times are sums over weight pushes.
    """
    sums = self._counters.take()
    requests = sums.pop("requests", 0.0)
    if requests:
      sums["queue_s"] /= requests
    return sums

  def close(self) -> None:
    """Releases the servers; running requests are abandoned."""
    if self._loop.is_closed():
      return
    self._run(self._fleet.stop())
    self._loop.call_soon_threadsafe(self._loop.stop)
    self._thread.join()
    self._loop.close()

  def _run(self, work: Coroutine[Any, Any, _Result]) -> _Result:  # Any: unused.
    """Runs a coroutine in the event loop's thread and returns its result."""
    future = asyncio.run_coroutine_threadsafe(work, self._loop)
    try:
      return future.result()
    finally:
      future.cancel()

  async def _sample(
    self, prompts: Sequence[types.Prompt], params: types.SamplingParams
  ) -> list[list[types.Completion]]:
    """Splits the prompts into requests and concatenates the results."""
    if self._publish is not None and self._fleet.pushed is None:
      raise RuntimeError("Push weights before sampling from them.")
    context_length.check(
      prompts,
      params.max_completion_tokens,
      self.context_length,
      limit_name="The servers' max_model_len",
    )
    size = min(
      max(1, self._max_rows // params.group_size),
      -(-len(prompts) // len(self._fleet.servers)),
    )
    return await _concurrently(
      self._request(part, params) for part in _split(prompts, size)
    )

  async def _request(
    self,
    prompts: Sequence[types.Prompt],
    params: types.SamplingParams,
    late: Sequence[fleet.Server] = (),
  ) -> list[list[types.Completion]]:
    """Sends a request to one server after another until one answers.

    Before the last permitted timeout the request is split into single prompts,
    so that only prompts that time out themselves are dropped. `late` lists the
    servers on which it timed out.
    """
    name, late = uuid.uuid4().hex, list(late)
    failures: list[str] = []
    while len(failures) < _MAX_MOVES and len(late) < _MAX_LATE:
      if len(late) == _MAX_LATE - 1 and len(prompts) > 1:
        return await _concurrently(
          self._request([prompt], params, late) for prompt in prompts
        )
      server = await self._find_server(late)
      request = _to_request(name, prompts, params, server.version)
      try:
        return await self._send(server, request)
      except errors.RolloutError as error:
        failures.append(f"{server.client.url}: {error.why}")
        if isinstance(error, client.RefusedError) and error.status != _CONFLICT:
          raise
        if isinstance(error, client.LateError):
          late.append(server)  # The request may be slow, or the server hung.
          await self._fleet.doubt(server)
        # A version conflict due to a concurrent update is not a failure.
        elif server.version == request.version:
          await self._fleet.drain(server, error)
    if len(late) == _MAX_LATE:
      logging.warning(
        "Dropped row %s: %s", prompts[0].row_id, "; ".join(failures)
      )
      return [[]]
    raise errors.RolloutError(
      f"A request failed on {len(failures)} rollout servers.",
      where=f"{len(prompts)} prompts from row {prompts[0].row_id}",
      why="; ".join(failures),
      fix="See the servers' logs.",
    )

  async def _find_server(self, late: Sequence[fleet.Server]) -> fleet.Server:
    """Waits for a server with capacity, preferably one not in `late`."""
    started = time.monotonic()
    # The last attempt is a single prompt and does not wait for capacity.
    is_last = len(late) == _MAX_LATE - 1
    max_rows = math.inf if is_last else _MAX_REQUESTS * self._max_rows
    server = await self._fleet.wait_for(
      lambda: self._fleet.ready(max_rows, avoid=late)
    )
    self._counters.add(queue_s=time.monotonic() - started)
    return server

  async def _send(
    self, server: fleet.Server, request: wire.GenerateRequest
  ) -> list[list[types.Completion]]:
    """Sends a request to a server and tracks the server's load."""
    cost = sum(
      len(prompt.token_ids or ()) + request.n * request.max_tokens
      for prompt in request.prompts
    )
    num_rows = len(request.prompts) * request.n
    server.num_rows += num_rows
    server.num_tokens += cost
    try:
      reply = await _unless_lost(server, request)
    finally:
      server.num_rows -= num_rows
      server.num_tokens -= cost
      await self._fleet.notify()
    self._counters.add(requests=1, queue_s=reply.queue_s)
    return _to_completions(reply)


def _split(
  prompts: Sequence[types.Prompt], size: int
) -> list[list[types.Prompt]]:
  """Splits prompts into requests of `size` that servers accept."""
  parts: list[list[types.Prompt]] = []
  num_tokens = 0
  for prompt in prompts:
    num_tokens += len(prompt.token_ids)
    if not parts or len(parts[-1]) == size or num_tokens > _MAX_TOKENS:
      parts.append([])
      num_tokens = len(prompt.token_ids)
    parts[-1].append(prompt)
  return parts


async def _concurrently(
  requests: Iterable[Coroutine[Any, Any, list[_Result]]],  # Any: unused.
) -> list[_Result]:
  """Runs requests concurrently and concatenates their results."""
  try:
    async with asyncio.TaskGroup() as tasks:
      parts = [tasks.create_task(request) for request in requests]
  except BaseExceptionGroup as group:
    raise group.exceptions[0] from group
  return [result for part in parts for result in part.result()]


async def _unless_lost(
  server: fleet.Server, request: wire.GenerateRequest
) -> wire.GenerateResponse:
  """Waits for a response until the server is drained."""
  call = asyncio.ensure_future(server.client.generate(request))
  lost = asyncio.ensure_future(server.lost.wait())
  try:
    await asyncio.wait({call, lost}, return_when=asyncio.FIRST_COMPLETED)
    if call.done():
      return call.result()
    raise client.UnavailableError(
      "A rollout server failed during a request.",
      where=server.client.url,
      why=server.failure,
      fix="None needed: the request moves to another server.",
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
    # With other weights it is a different request with a different answer.
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
    with_text=False,
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
