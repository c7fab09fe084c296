# SPDX-License-Identifier: Apache-2.0
"""Times the teaching protocol by question against phase by phase.

  python -m scripts.bench.phases --tokenizer=.cache/smoke_world/teacher

Starts a policy and a student server on loopback, whose engines sleep for each
token instead of computing it, and run a fixed number of sequences at a time.
Lengths are drawn at random for each completion. Both ways get the same records;
printed are the seconds of a step and the share of them without a sequence on
each server. The first two rows include the baselines, the ratio does not.
"""

import asyncio
from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import pathlib
import threading
import time
import zlib

from absl import flags, logging
import numpy as np

from atlas_jax import chat, types
from atlas_jax.teaching import protocol, roles, templates
from configs.data import world
from rollout import wire
from rollout.remote import client, fleet, http_sampler
from rollout.server import (
  admission,
  app,
  engine,
  listen,
  service,
  weight_channel,
)
from scripts import program

_TOKENIZER = flags.DEFINE_string(
  "tokenizer", None, "A directory with a tokenizer.", required=True
)
_TOKEN_MS = flags.DEFINE_float("token_ms", 50.0, "Milliseconds per token.")
_SEQUENCES = flags.DEFINE_integer(
  "sequences", 64, "Sequences that a server runs at a time."
)
_QUESTIONS = flags.DEFINE_integer("questions", 32, "Questions of a step.")
_GROUP_SIZE = flags.DEFINE_integer("group_size", 8, "Teachings per question.")
_MEAN_TOKENS = flags.DEFINE_integer("mean_tokens", 20, "Mean tokens.")
_REPEATS = flags.DEFINE_integer(
  "repeats", 3, "Steps of each kind after the first."
)

_LIMITS = service.Limits(
  max_body_bytes=2**25,
  max_total_body_bytes=2**28,
  max_text_chars=2**20,
  max_prompts=4096,
  max_n=256,
  max_tokens=4096,
  max_queue=16384,
  hang_s=300.0,
  drain_s=60.0,
  load_s=60.0,
)
_DIGEST = "benchmark"  # Of a tokenizer.
_ROW = "| {:<18} | {:>6} | {:>11} | {:>12} |"


class _SleepingEngine:
  """Generates tokens at a fixed rate per sequence; see `engine.Engine`."""

  is_alive = True

  def __init__(self) -> None:
    self.facts = engine.Facts("jax", "sleeping", 2**20, 2**20, 1)
    self.busy_s, self._num_running, self._since = 0.0, 0, 0.0
    self._free = asyncio.Semaphore(_SEQUENCES.value)

  @property
  def last_progress_s(self) -> float:
    return time.monotonic()

  def tokenize(self, text: str) -> list[int]:
    return [0] * len(text)

  def decode(self, token_ids: Sequence[int]) -> str:
    del token_ids  # The trainer asks for no text.
    return ""

  async def generate(
    self, prompts: Sequence[types.Prompt], params: types.SamplingParams
  ) -> list[list[wire.CompletionOut]]:
    return await asyncio.gather(
      *(
        asyncio.gather(
          *(self._generate(p, params, i) for i in range(params.group_size))
        )
        for p in prompts
      )
    )

  async def _generate(
    self, prompt: types.Prompt, params: types.SamplingParams, member: int
  ) -> wire.CompletionOut:
    """Sleeps for an exponentially distributed number of tokens."""
    seed = zlib.crc32(prompt.row_id.encode())
    rng = np.random.default_rng((seed, params.seed, member))
    drawn = 1 + int(rng.exponential(_MEAN_TOKENS.value))
    num_tokens = min(drawn, params.max_completion_tokens)
    async with self._free:
      self._count(1)
      await asyncio.sleep(num_tokens * _TOKEN_MS.value / 1000)
      self._count(-1)
    return wire.CompletionOut(
      token_ids=rng.integers(5, 50, num_tokens).tolist(),
      logprobs=[-1.0] * num_tokens,
      model_logprobs=None,
      finish_reason="stop",
    )

  def _count(self, change: int) -> None:
    now = time.monotonic()
    if self._num_running:
      self.busy_s += now - self._since
    self._since, self._num_running = now, self._num_running + change

  async def load(self, directory: pathlib.Path, version: int) -> None:
    del directory, version  # The benchmark pushes no weights.

  async def reset_prefix_cache(self) -> bool:
    return True

  def metrics(self) -> Mapping[str, float]:
    return {}

  def close(self) -> None:
    pass


def _serve() -> tuple[_SleepingEngine, str]:
  """Serves an engine in a thread; returns it and the address."""
  started, opened = threading.Event(), []

  async def serve() -> None:
    sleeping = _SleepingEngine()
    weights = weight_channel.Channel(
      role="student", shapes={}, tokenizer_digest=_DIGEST, allowed_root=None
    )
    backend = service.Service(
      sleeping,
      weights,
      role="student",
      tokenizer_digest=_DIGEST,
      limits=_LIMITS,
    )
    tokens = admission.Tokens(user=None, admin=None)
    with listen.bind("127.0.0.1", 0) as bound:
      serving = asyncio.create_task(
        listen.serve(app.create_app(backend, tokens=tokens), bound, drain_s=1.0)
      )
      url = f"http://127.0.0.1:{bound.getsockname()[1]}"
      opened.extend([sleeping, url])
      started.set()
      await serving

  # A daemon: it stops with the process.
  threading.Thread(target=lambda: asyncio.run(serve()), daemon=True).start()
  started.wait()
  return opened[0], opened[1]


class _OnePhaseAtATime(http_sampler.HttpSampler):
  """A sampler whose calls the protocol does not overlap."""

  @property
  def is_concurrent(self) -> bool:
    return False


def _connect(
  create: type[http_sampler.HttpSampler], url: str
) -> http_sampler.HttpSampler:
  return create(
    [url],
    channel=fleet.ChannelTerms("student", {}, _DIGEST, "", 30.0, 30.0),
    deadlines=client.Deadlines(generate_s=600.0, update_s=60.0, control_s=30.0),
    token=None,
    publish=None,
    max_rows=256,
  )


def main() -> None:
  """Prints the table."""
  directory = pathlib.Path(_TOKENIZER.value)
  tokenizer = chat.load_tokenizer(directory)
  logging.set_verbosity(logging.WARNING)
  servers = [_serve() for _ in ("policy", "student")]
  engines = [each for each, _ in servers]
  urls = [url for _, url in servers]
  with contextlib.ExitStack() as opened:
    print(
      f"{_QUESTIONS.value} questions, {_GROUP_SIZE.value} teachings each, "
      f"{_MEAN_TOKENS.value} tokens on average, {_TOKEN_MS.value:g} ms per "
      f"token, {_SEQUENCES.value} sequences at a time"
    )
    header = ("phases", "s", "policy idle", "student idle")
    print(_ROW.format(*header))
    print(_ROW.format("---", "---:", "---:", "---:"))
    both = {
      name: _protocol(
        opened.enter_context(_connect(create, urls[0])),
        opened.enter_context(_connect(create, urls[1])),
        tokenizer,
      )
      for name, create in (
        ("one after another", _OnePhaseAtATime),
        ("per question", http_sampler.HttpSampler),
      )
    }
    taken: dict[str, list[float]] = {name: [] for name in both}
    for repeat in range(1 + _REPEATS.value):
      found = []
      for name, asked in both.items():
        idle = [-e.busy_s for e in engines]
        start = time.monotonic()
        records = asked.run(_questions(), seed=repeat)
        seconds = time.monotonic() - start
        idle = [
          1 - (before + e.busy_s) / seconds
          for before, e in zip(idle, engines, strict=True)
        ]
        if repeat:  # The first step samples the baselines too.
          taken[name].append(seconds)
        print(_ROW.format(name, f"{seconds:.2f}", *(f"{i:.0%}" for i in idle)))
        found.append([dataclasses.replace(r, seconds=0.0) for r in records])
      if found[0] != found[1]:
        raise RuntimeError("The two ways have different records.")
    before, after = (float(np.median(each)) for each in taken.values())
    print(
      f"Ratio of the medians: {before / after:.2f}, n={_REPEATS.value} each"
    )


def _protocol(
  policy: types.Sampler, student: types.Sampler, tokenizer: chat.Tokenizer
) -> protocol.Protocol:
  def params(group_size: int) -> types.SamplingParams:
    return types.SamplingParams(
      group_size=group_size,
      max_completion_tokens=10 * _MEAN_TOKENS.value,
      temperature=1.0,
      top_p=1.0,
      top_k=0,
      seed=0,
    )

  settings: types.Config = world.get_templates()
  return protocol.Protocol(
    roles.Role(policy, tokenizer),
    roles.Role(student, tokenizer),
    templates.Templates(**settings),
    probe_params=params(1),
    teach_params=params(_GROUP_SIZE.value),
    solve_params=params(1),
    baseline_params=params(4),
  )


def _questions() -> list[types.Question]:
  return [
    types.Question(f"q{i}", f"What is {i} + 1?", str(i + 1))
    for i in range(_QUESTIONS.value)
  ]


if __name__ == "__main__":
  program.run(main)
