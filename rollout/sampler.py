# SPDX-License-Identifier: Apache-2.0
"""Opens the sampler of a config, in process or on rollout servers.

Each backend is imported only if it is used.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
from typing import Any, Literal

import jax

from atlas_jax import chat, errors, types
from atlas_jax.models import decoder
from conversion import process_group
from rollout import tokens, wire

_Opened = contextlib.AbstractContextManager[types.Sampler]
_Publish = Callable[[Mapping[str, Any], int], str]  # Any: see `_publish`.

# Small shards: files are written and verified in parallel.
_SHARD_BYTES = 2**26
# A server closes the weight channel after this time without a heartbeat.
_HEARTBEAT_S = 30.0
_CONTROL_S = 30.0


@dataclasses.dataclass(frozen=True)
class Settings:
  """Where completions are sampled.

  The backend "jax" samples in this process and ignores the other fields. The
  backend "http" samples on the servers of each role. `weights_root` is a
  directory shared with the policy's servers, "" for one in /dev/shm; `dtype` is
  that of the pushed weights. `wait_s` is how long to wait while no server is
  available; `generate_s` and `update_s` limit a request and a weight push.
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
    """Validates the backend and rejects unused addresses."""
    if self.backend not in ("jax", "http"):
      raise errors.ConfigError(
        f"rollout.backend must be jax or http, got {self.backend!r}.",
        where="--config.rollout.backend",
        why="There are no other backends.",
        fix="Use jax to sample in this process, http for rollout servers.",
      )
    urls_by_role = {"policy": self.policy_urls, "student": self.student_urls}
    for role, urls in urls_by_role.items():
      if urls and self.backend == "jax":
        raise errors.ConfigError(
          f"rollout.{role}_urls requires backend=http, got {len(urls)} URLs.",
          where=f"--config.rollout.{role}_urls",
          why="With backend=jax, servers would be ignored.",
          fix="Set --config.rollout.backend=http, or remove the URLs.",
        )

  def urls(self, role: wire.Role) -> Sequence[str]:
    """Returns the addresses of a role's servers.

    Raises:
      errors.ConfigError: if there are none.
    """
    urls = self.policy_urls if role == "policy" else self.student_urls
    if not urls:
      raise errors.ConfigError(
        f"rollout.{role}_urls is empty.",
        where=f"--config.rollout.{role}_urls",
        why=f"backend={self.backend} needs at least one server per role.",
        fix="Set the servers' addresses, or --config.rollout.backend=jax.",
      )
    return urls


@contextlib.contextmanager
def open_sampler(  # noqa: PLR0913 - two backends, one or more processes.
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
  """Opens a sampler, and closes it on exit.

  The backend jax holds `params` as version 0, and samples on the devices of all
  processes. With http, the first process sends the requests, and the policy's
  version is -1 until the first `update_weights`: a resumed run pushes once.

  Args:
    role: of the sampled model.
    settings: where to sample.
    directory: the model, in Hugging Face format.
    model: the model to sample from.
    params: its parameters; unused with servers.
    tokenizer: of the directory.
    mesh: where to sample with the backend jax.
    max_rows: maximum completions decoded at once, or per request.
    share: this process's place among the processes of the run.
    from_first: broadcasts from the first process; used by this sampler only.

  Yields:
    The sampler.

  Raises:
    errors.AtlasError: if servers are unavailable or do not match.
  """
  if settings.backend == "http":
    connect = functools.partial(
      _connect, role, settings, directory, model, max_rows
    )
    if role == "student":
      opened = _open_student(connect, settings, share, from_first)
    else:
      opened = _open_policy(
        connect, settings, directory, model, share, from_first
      )
    with opened as sampler:
      yield sampler
    return
  from rollout import jax_sampler  # Not needed with the backend http.

  yield jax_sampler.JaxSampler(
    model,
    params,
    mesh=mesh,
    stop_token_ids=chat.stop_token_ids(tokenizer, directory),
    max_rows=max_rows,
  )


def _open_student(
  connect: Callable[..., _Opened],
  settings: Settings,
  share: process_group.ProcessShare,
  from_first: types.OnFirstProcess,
) -> _Opened:
  """Opens a sampler on the student's servers, whose weights are fixed."""
  fixed = functools.partial(
    connect, settings.urls("student"), pathlib.Path(), publish=None
  )
  return _open_shared(fixed, None, share, from_first)


@contextlib.contextmanager
def _open_policy(
  connect: Callable[..., _Opened],
  settings: Settings,
  directory: pathlib.Path,
  model: decoder.Model,
  share: process_group.ProcessShare,
  from_first: types.OnFirstProcess,
) -> Iterator[types.Sampler]:
  """Opens a sampler on the policy's servers."""
  from rollout.remote import push  # Needs an HTTP client.

  # Runs that use the same servers share a directory. The weight channel admits
  # one run at a time, which then removes what a killed run left there.
  urls = settings.urls("policy")
  run = hashlib.sha256("\n".join(urls).encode()).hexdigest()[:12]
  root = push.open_root(settings.weights_root, run=run)
  publish = functools.partial(
    _publish,
    model=model,
    root=root,
    source=directory,
    dtype=settings.dtype,
    share=share,
  )
  pushing = functools.partial(connect, urls, root, publish=publish)
  with _open_shared(pushing, publish, share, from_first) as sampler:
    if share.index == 0:
      push.prune(root, keep=0)
    try:
      yield sampler
    finally:
      if share.index == 0:
        push.prune(root, keep=0)
        if not settings.weights_root:
          root.rmdir()


@contextlib.contextmanager
def _open_shared(
  connect: Callable[[], _Opened],
  publish: _Publish | None,
  share: process_group.ProcessShare,
  from_first: types.OnFirstProcess,
) -> Iterator[types.Sampler]:
  """Connects the first process, and shares its sampler with the others."""
  from rollout.remote import shared_sampler  # Needs an HTTP client.

  with contextlib.ExitStack() as opened:
    own: list[types.Sampler] = []  # Empty in all processes but the first.
    from_first(lambda: own.append(opened.enter_context(connect())))
    if share.count == 1:
      yield own[0]
    else:
      yield shared_sampler.SharedSampler(
        own[0] if own else None,
        from_first,
        update_weights=own[0].update_weights if own else publish,
      )


def _connect(
  role: wire.Role,
  settings: Settings,
  directory: pathlib.Path,
  model: decoder.Model,
  max_rows: int,
  urls: Sequence[str],
  root: pathlib.Path,
  *,
  publish: _Publish | None,
) -> _Opened:
  """Waits for the servers of a role and returns their sampler."""
  from conversion import rules
  from rollout import manifest
  from rollout.remote import client, fleet, http_sampler

  return http_sampler.HttpSampler(
    urls,
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
    token=tokens.of_environment(os.environ),
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
  """Writes a version where servers can load it; returns its digest."""
  from atlas_jax.models import quantized  # Not needed with the backend jax.
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
    # A server may still be loading the previous version.
    push.prune(root, keep=2)
  return published.digest
