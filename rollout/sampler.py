# SPDX-License-Identifier: Apache-2.0
"""Opens the sampler that a config asks for: the one place that knows all.

What a backend needs is imported when it is asked for.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import hashlib
import pathlib
from typing import Any, Literal

import jax

from atlas_jax import chat, errors, types
from atlas_jax.models import decoder
from conversion import process_group
from rollout import wire

# Files are written and checked in parallel, so there are many of them.
_SHARD_BYTES = 2**26
# A server gives up a trainer that it did not hear of for so long.
_HEARTBEAT_S = 30.0
_CONTROL_S = 30.0


@dataclasses.dataclass(frozen=True)
class Settings:
  """Where completions come from.

  With the backend "jax" it is this process, and nothing else counts. With
  "http" it is the servers of each role; `weights_root` is a directory shared
  with the policy's, "" for one in this machine's memory, and `dtype` that of
  the weights handed to them. `wait_s` is how long to go on without any server,
  `generate_s` and `update_s` what one request and one hand-off may take.
  """

  backend: Literal["jax", "http"]
  policy_urls: Sequence[str]
  student_urls: Sequence[str]
  weights_root: str
  dtype: Literal["float32", "bfloat16"]
  wait_s: float
  generate_s: float
  update_s: float

  def __post_init__(self) -> None:
    """Refuses what neither backend could honour."""
    if self.backend not in ("jax", "http"):
      raise errors.ConfigError(
        f"There is no rollout backend {self.backend!r}.",
        where="--config.rollout.backend",
        why="It is one of jax and http.",
        fix="Use jax to sample in this process, http for rollout servers.",
      )
    given = {"policy": self.policy_urls, "student": self.student_urls}
    for role, urls in given.items():
      if urls and self.backend == "jax":
        raise errors.ConfigError(
          f"{len(urls)} servers are given for the {role}.",
          where=f"--config.rollout.{role}_urls",
          why="With backend=jax there is no use for any.",
          fix="Set --config.rollout.backend=http, or leave them out.",
        )

  def urls(self, role: wire.Role) -> Sequence[str]:
    """Gives the servers of a role.

    Raises:
      errors.ConfigError: if there are none.
    """
    urls = self.policy_urls if role == "policy" else self.student_urls
    if not urls:
      raise errors.ConfigError(
        f"No servers are given for the {role}.",
        where=f"--config.rollout.{role}_urls",
        why=f"With backend={self.backend} there is nobody to ask.",
        fix="Give their addresses, or set --config.rollout.backend=jax.",
      )
    return urls


@contextlib.contextmanager
def open_sampler(  # noqa: PLR0913 - whose, where, of what, and with whom.
  role: wire.Role,
  settings: Settings,
  *,
  directory: pathlib.Path,
  model: decoder.Model,
  params: decoder.Params,
  tokenizer: chat.Tokenizer,
  mesh: jax.sharding.Mesh,
  max_rows: int,
  share: process_group.ProcessShare = process_group.ALONE,
  from_first: types.OnFirstProcess = lambda make: make(),
) -> Iterator[types.Sampler]:
  """Opens a sampler of `params`, as version 0, and closes it.

  Several processes that train as one sample as one too, on all their devices;
  servers are asked by the first of them.

  Args:
    role: whose sampler it is.
    settings: where it samples.
    directory: the model, in Hugging Face format.
    model: what is sampled from.
    params: its parameters; not looked at for a student on servers.
    tokenizer: of the directory.
    mesh: where it samples, if in this process.
    max_rows: completions decoded at once, or asked for in one request.
    share: which of several processes this is.
    from_first: for the calls of this sampler alone.

  Yields:
    The sampler.

  Raises:
    errors.AtlasError: if servers are not there, or are not what they should
      be.
  """
  if settings.backend == "http":
    with _open_http(
      role,
      settings,
      directory=directory,
      model=model,
      params=params,
      max_rows=max_rows,
      share=share,
      from_first=from_first,
    ) as sampler:
      yield sampler
    return
  from rollout import jax_sampler  # Only where it samples itself.

  yield jax_sampler.JaxSampler(
    model,
    params,
    mesh=mesh,
    stop_token_ids=chat.stop_token_ids(tokenizer, directory),
    max_rows=max_rows,
  )


@contextlib.contextmanager
def _open_http(
  role: wire.Role,
  settings: Settings,
  *,
  directory: pathlib.Path,
  model: decoder.Model,
  params: decoder.Params,
  max_rows: int,
  share: process_group.ProcessShare,
  from_first: types.OnFirstProcess,
) -> Iterator[types.Sampler]:
  """Opens a sampler on servers, and gives a policy's its first weights."""
  from rollout.remote import (
    push,  # These need an HTTP client.
    shared_sampler,
  )

  is_policy, is_first = role == "policy", share.index == 0
  urls = settings.urls(role)
  # Whoever reaches the same servers waits for its turn, and then cleans up.
  run = hashlib.sha256("\n".join(urls).encode()).hexdigest()[:12]
  root = pathlib.Path()
  if is_policy:
    root = push.open_root(settings.weights_root, run=run)
  publish = functools.partial(
    _publish,
    model=model,
    root=root,
    source=directory,
    dtype=settings.dtype,
    share=share,
  )
  with contextlib.ExitStack() as opened:
    asks: list[Any] = []  # Any: an `HttpSampler`, in the first process.

    def open_servers() -> None:
      asking = _ask_servers(
        role,
        settings,
        root=root,
        directory=directory,
        model=model,
        max_rows=max_rows,
        publish=publish if is_policy else None,
      )
      asks.append(opened.enter_context(asking))

    from_first(open_servers)
    if share.count > 1:
      sampler = shared_sampler.SharedSampler(
        asks[0] if asks else None,
        from_first,
        update_weights=asks[0].update_weights if asks else publish,
      )
    else:
      (sampler,) = asks
    if is_policy and is_first:
      # The servers are ours alone now, so what lies there is a dead run's.
      push.prune(root, keep=0)
    if is_policy:
      sampler.update_weights(params, 0)
    try:
      yield sampler
    finally:
      if is_policy and is_first:
        push.prune(root, keep=0)
        if not settings.weights_root:
          root.rmdir()


def _ask_servers(
  role: wire.Role,
  settings: Settings,
  *,
  root: pathlib.Path,
  directory: pathlib.Path,
  model: decoder.Model,
  max_rows: int,
  publish: Callable[[Mapping[str, Any], int], str] | None,  # Any: see types.
) -> Any:  # Any: an `HttpSampler`, which is imported where it is asked for.
  """Waits for the servers of a role, and makes the sampler that asks them."""
  from conversion import rules
  from rollout import manifest
  from rollout.remote import client, fleet, http_sampler

  return http_sampler.HttpSampler(
    settings.urls(role),
    channel=fleet.ChannelTerms(
      role=role,
      tensors=rules.shapes(model),
      tokenizer_digest=manifest.tokenizer_digest(directory),
      weights_root=str(root),
      heartbeat_s=_HEARTBEAT_S,
      wait_s=settings.wait_s,
    ),
    deadlines=client.Deadlines(
      generate_s=settings.generate_s,
      update_s=settings.update_s,
      control_s=_CONTROL_S,
    ),
    token=client.token_of_environment(),
    publish=publish,
    max_rows=max_rows,
  )


def _publish(
  params: Mapping[str, Any],  # Any: arrays and mappings of them.
  version: int,
  *,
  model: decoder.Model,
  root: pathlib.Path,
  source: pathlib.Path,
  dtype: Literal["float32", "bfloat16"],
  share: process_group.ProcessShare,
) -> str:
  """Writes a version to where servers find it; gives its digest."""
  from atlas_jax.models import quantized  # These need what the trainer has.
  from rollout.remote import push

  published = push.publish(
    quantized.whole(params, model.dtype),
    model,
    root,
    version,
    source=source,
    dtype=dtype,
    max_shard_bytes=_SHARD_BYTES,
    share=share,
  )
  if share.index == 0:
    # The one before may still be on its way into a server.
    push.prune(root, keep=2)
  return published.digest
