# SPDX-License-Identifier: Apache-2.0
"""A sampler whose work is done by rollout servers.

Prompts are cut into requests, and each goes to the server with the fewest
tokens outstanding. Where a server fails, its requests go to others with their
ids unchanged. One that is late is asked for elsewhere, at last prompt by
prompt; a prompt that is late then too is given up.
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
from rollout import counters, wire
from rollout.remote import client, fleet

_Result = TypeVar("_Result")
# Writes weights and their version to where servers find them, and gives the
# digest of their manifest.
Publish = Callable[[Mapping[str, Any], int], str]  # Any: see types.

# More requests than this wait here, where they can still go to any server.
_MAX_REQUESTS = 8
# A request that fails on this many servers is not failed by the servers.
_MAX_MOVES = 8
# Nor is one late by their fault that was waited for so often, in full.
_MAX_LATE = 3
_CONFLICT = 409


class HttpSampler:
  """Samples with rollout servers of one role. See `types.Sampler`.

  Several threads may use it at once. Close it, or use it in a `with`.
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
    """Waits until every server is up, and is what it should be.

    Args:
      urls: of the servers.
      channel: what is said to them.
      deadlines: of calls to one server.
      token: see `client.Client`.
      publish: hands weights on; None for a student, whose weights stay as they
        are.
      max_rows: completions in one request, unless one prompt has more.

    Raises:
      errors.ConfigError: if a server has another role or tokenizer.
      errors.RolloutError: if one is not up in time, or refuses the channel.
    """
    if not urls or (publish is None) != (channel.role == "student"):
      raise ValueError(
        f"Got {len(urls)} servers of role {channel.role}, publish={publish}."
      )
    self._publish, self._max_rows = publish, max_rows
    self._version = -1
    self._tally = counters.Counters()
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

    None for a prompt that was late wherever it was asked for.

    Raises:
      errors.ConfigError: if a prompt with its completion would not fit into
        the servers' context; nothing is sent then.
      errors.RolloutError: if there was no server for too long, or requests
        fail wherever they are sent.
    """
    started = time.monotonic()
    groups = self._run(self._sample(prompts, params))
    self._tally.add(
      tokens=sum(len(c.token_ids) for group in groups for c in group),
      sample_s=time.monotonic() - started,
    )
    return groups

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
    replies = self._run(self._fleet.push(version, digest))
    self._version = version
    # Servers load at the same time; the slowest is what was waited for.
    drain_s = max((reply.drain_s for reply in replies), default=0.0)
    load_s = max((reply.load_s for reply in replies), default=0.0)
    push_s = time.monotonic() - start
    self._tally.add(
      push_s=push_s, publish_s=published_s, drain_s=drain_s, load_s=load_s
    )
    logging.info(
      "Weights of version %d are with %d of %d servers in %.3f s: %.3f s to "
      "write, %.3f s to drain, %.3f s to load.",
      *(version, self._fleet.num_ready, len(self._fleet.servers)),
      *(push_s, published_s, drain_s, load_s),
    )

  def take_metrics(self) -> Mapping[str, float]:
    """Gives what was done since it was last asked.

    `queue_s` is what requests waited for a free server and, there, for their
    turn, on average; the other times are of pushes, added up.
    """
    sums = self._tally.take()
    requests = sums.pop("requests", 0.0)
    if requests:
      sums["queue_s"] /= requests
    return sums

  def close(self) -> None:
    """Gives the servers back; what is still running there is abandoned."""
    if self._loop.is_closed():
      return
    self._run(self._fleet.stop())
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

  async def _sample(
    self, prompts: Sequence[types.Prompt], params: types.SamplingParams
  ) -> list[list[types.Completion]]:
    """Cuts the prompts into requests, and puts the answers together."""
    if self._publish is not None and self._fleet.pushed is None:
      raise RuntimeError("Push weights before sampling from them.")
    self._check_fits(prompts, params.max_completion_tokens)
    size = min(
      max(1, self._max_rows // params.group_size),
      -(-len(prompts) // len(self._fleet.servers)),
    )
    starts = range(0, len(prompts), max(1, size))
    return await _together(
      self._request(prompts[i : i + size], params) for i in starts
    )

  async def _request(
    self,
    prompts: Sequence[types.Prompt],
    params: types.SamplingParams,
    late: Sequence[fleet.Server] = (),
  ) -> list[list[types.Completion]]:
    """Sends one request to one server after another, until one answers it.

    The last time it may be `late` each of its prompts is asked for alone, so
    that no more is given up than what keeps the others waiting.
    """
    name, late = uuid.uuid4().hex, list(late)
    failures: list[str] = []
    while len(failures) < _MAX_MOVES and len(late) < _MAX_LATE:
      if len(late) == _MAX_LATE - 1 and len(prompts) > 1:
        return await _together(
          self._request([prompt], params, late) for prompt in prompts
        )
      server = await self._find_server(late)
      request = _to_request(name, prompts, params, server.version)
      try:
        return await self._ask(server, request)
      except errors.RolloutError as error:
        failures.append(f"{server.client.url}: {error.why}")
        if isinstance(error, client.RefusedError) and error.status != _CONFLICT:
          raise
        if isinstance(error, client.LateError):
          late.append(server)  # Perhaps by fault of this request alone.
          await self._fleet.doubt(server)
        # Weights replaced while the request was on its way are no failure.
        elif server.version == request.version:
          await self._fleet.drain(server, error)
    if len(late) == _MAX_LATE:
      logging.warning(
        "Row %s is given up: %s", prompts[0].row_id, "; ".join(failures)
      )
      return [[]]
    raise errors.RolloutError(
      "Completions cannot be had from any rollout server.",
      where=f"{len(prompts)} prompts from row {prompts[0].row_id}",
      why="; ".join(failures),
      fix="Look into the servers' logs.",
    )

  async def _find_server(self, late: Sequence[fleet.Server]) -> fleet.Server:
    """Waits for a server that has room; best one that was not late."""
    asked = time.monotonic()
    # Who asks for the last time has waited enough, and asks for little.
    is_last = len(late) == _MAX_LATE - 1
    max_requests = math.inf if is_last else _MAX_REQUESTS
    server = await self._fleet.wait_for(
      lambda: self._fleet.ready(max_requests, avoid=late)
    )
    self._tally.add(queue_s=time.monotonic() - asked)
    return server

  async def _ask(
    self, server: fleet.Server, request: wire.GenerateRequest
  ) -> list[list[types.Completion]]:
    """Asks one server, and counts what it has to do meanwhile."""
    cost = sum(
      len(prompt.token_ids or ()) + request.n * request.max_tokens
      for prompt in request.prompts
    )
    server.num_requests += 1
    server.num_tokens += cost
    try:
      reply = await _unless_lost(server, request)
    finally:
      server.num_requests -= 1
      server.num_tokens -= cost
      await self._fleet.notify()
    self._tally.add(requests=1, queue_s=reply.queue_s)
    return _to_completions(reply)

  def _check_fits(self, prompts: Sequence[types.Prompt], max_new: int) -> None:
    limit = min(server.max_model_len for server in self._fleet.servers)
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


async def _together(
  requests: Iterable[Coroutine[Any, Any, list[_Result]]],  # Any: unused.
) -> list[_Result]:
  """Does requests at the same time, and strings together what they give."""
  try:
    async with asyncio.TaskGroup() as tasks:
      parts = [tasks.create_task(request) for request in requests]
  except BaseExceptionGroup as group:
    raise group.exceptions[0] from group
  return [result for part in parts for result in part.result()]


async def _unless_lost(
  server: fleet.Server, request: wire.GenerateRequest
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
