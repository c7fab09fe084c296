# SPDX-License-Identifier: Apache-2.0
"""A rollout server with a fake engine that a test controls."""

import asyncio
import contextlib
import threading
import time

import httpx2
import numpy as np

from conversion import shards
from rollout import manifest, wire
from rollout.server import admission, app, engine, service, weight_channel

SHAPES = {"a.weight": (3, 4), "b.weight": (5,)}
TOKEN = "0123456789abcdef"


class Engine:
  """An engine that generates while `go` is set, and counts its calls."""

  facts = engine.Facts("jax", "model", 32, 10, 1)
  is_alive = True

  def __init__(self):
    self.go = asyncio.Event()
    self.go.set()
    self.last_progress_s = time.monotonic()
    self.num_calls = self.num_resets = 0
    self.loaded, self.load_error, self.logprob = [], None, -0.5
    self.is_cache_used, self.threads, self.prompts = False, set(), ()

  def tokenize(self, text):
    """Returns the length of each word as its token id."""
    self.threads.add(threading.current_thread().name)
    return [len(word) for word in text.split()]

  def decode(self, token_ids):
    """Returns the token ids, separated by spaces."""
    self.threads.add(threading.current_thread().name)
    return " ".join(map(str, token_ids))

  async def generate(self, prompts, params):
    """Returns fixed completions once `go` is set."""
    self.num_calls += 1
    self.prompts = prompts
    await self.go.wait()
    self.last_progress_s = time.monotonic()
    one = wire.CompletionOut(
      token_ids=[1, 2],
      logprobs=[self.logprob, -0.25],
      model_logprobs=None,
      finish_reason="stop",
    )
    return [[one] * params.group_size for _ in prompts]

  async def load(self, directory, version):
    """Records the loaded version."""
    if self.load_error:
      raise self.load_error
    self.loaded.append((directory.name, version))

  async def reset_prefix_cache(self):
    """Counts resets."""
    self.num_resets += not self.is_cache_used
    return not self.is_cache_used

  def metrics(self):
    """Returns one value."""
    return {"load": 0.5}

  def close(self):
    """Does nothing."""


class Server:
  """An app with a fake engine, and a client in the same event loop."""

  def __init__(
    self, *, role="policy", token=None, admin_token=None, allowed=None, **limits
  ):
    self.engine, self.now = Engine(), 0.0
    self.weights = weight_channel.Channel(
      role=role,
      shapes=SHAPES,
      tokenizer_digest="tok",
      allowed_root=allowed,
      clock=lambda: self.now,
    )
    self.service = service.Service(
      self.engine,
      self.weights,
      role=role,
      tokenizer_digest="tok",
      limits=service.Limits(
        **{
          "max_body_bytes": 4096,
          "max_total_body_bytes": 2**24,
          "max_text_chars": 1000,
          "max_prompts": 4,
          "max_n": 3,
          "max_tokens": 16,
          "max_queue": 6,
          "hang_s": 30.0,
          "drain_s": 5.0,
          "load_s": 5.0,
          **limits,
        }
      ),
    )
    tokens = admission.Tokens(user=token, admin=admin_token)
    self.app = app.create_app(self.service, tokens=tokens)

  @contextlib.asynccontextmanager
  async def client(self, **kwargs):
    """Yields a client of the app."""
    transport = httpx2.ASGITransport(app=self.app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(
      transport=transport, base_url="http://test", **kwargs
    ) as client:
      yield client


def run(test):
  async def limited():
    async with asyncio.timeout(30):
      await test()

  asyncio.run(limited())


def request(request_id="r", *, prompts=None, **changes):
  return {
    "request_id": request_id,
    "prompts": prompts or [{"row_id": "row", "token_ids": [3, 4]}],
    "n": 1,
    "max_tokens": 8,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "seed": 0,
    **changes,
  }


def init(root, trainer_id="t", **changes):
  tensors = [{"name": n, "shape": list(s)} for n, s in SHAPES.items()]
  return {
    "trainer_id": trainer_id,
    "process": "",
    "role": "policy",
    "tensors": tensors,
    "tokenizer_digest": "tok",
    "weights_root": str(root),
    "heartbeat_s": 10.0,
    **changes,
  }


def push(root, version, fill=1.0):
  """Writes a version as a trainer does; returns the update request."""
  directory = manifest.directory_of(root, version)
  directory.mkdir()
  shards.write(
    directory,
    SHAPES,
    lambda name: np.full(SHAPES[name], fill, np.float32),
    dtype="float32",
    max_shard_bytes=10**9,
  )
  tensors = {
    name: manifest.Tensor(shape=shape, dtype="F32")
    for name, shape in SHAPES.items()
  }
  files = {path.name: manifest.describe(path) for path in directory.iterdir()}
  listed = manifest.Manifest(version=version, files=files, tensors=tensors)
  digest = manifest.write(directory, listed)
  return {"trainer_id": "t", "version": version, "digest": digest}


async def until(condition):
  while not condition():
    await asyncio.sleep(0.001)


def assert_rejected(reply, status, error):
  refusal = wire.Refusal.model_validate(reply.json())
  assert (reply.status_code, refusal.error) == (status, error), refusal
