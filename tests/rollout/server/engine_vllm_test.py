# SPDX-License-Identifier: Apache-2.0
"""The vLLM engine, in its own environment, matches the JAX sampler.

One server is started for all tests of this file.
"""

import concurrent.futures
import dataclasses
import math
import os
import pathlib
import signal
import socket
import subprocess
import time

import httpx2
import jax
import numpy as np
import pytest

from atlas_jax import sharding, types
from conversion import rules
from rollout import jax_sampler, manifest, wire
from rollout.remote import push
from tests import fakes, processes, tiny

_ROOT = processes.ROOT
_PYTHON = _ROOT / ".venv-rollout/bin/python"
# vLLM's CPU attention requires a head size of at least 32.
_FIELDS = {
  "vocab_size": 300,
  "hidden_size": 64,
  "intermediate_size": 96,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 32,
  # The harder case: pushed weights contain no LM head.
  "tie_word_embeddings": True,
}
_START_S = 300.0

pytestmark = [
  pytest.mark.vllm,
  pytest.mark.slow,
  pytest.mark.skipif(
    not _PYTHON.exists(),
    reason="No .venv-rollout; run bash scripts/install_rollout.sh.",
  ),
]


@dataclasses.dataclass
class _Server:
  """A running server and its model."""

  process: subprocess.Popen
  client: httpx2.Client
  directory: pathlib.Path
  model: object
  params: object

  def request(self, request_id, prompts=None, **changes):
    return {
      "request_id": request_id,
      "prompts": [
        {"row_id": row_id, "token_ids": list(token_ids)}
        for row_id, token_ids in prompts or _prompts()
      ],
      "n": 1,
      "max_tokens": 12,
      "temperature": 1.0,
      "top_p": 1.0,
      "top_k": 0,
      "seed": 0,
      **changes,
    }

  def generate(self, request_id, prompts, **changes):
    request = self.request(request_id, prompts, **changes)
    reply = self.client.post("/generate", json=request)
    assert reply.status_code == 200, reply.text
    return wire.GenerateResponse.model_validate(reply.json())


@pytest.fixture(scope="module")
def served(tmp_path_factory):
  directory = tmp_path_factory.mktemp("vllm") / "model"
  model, params = tiny.write_checkpoint(directory, "qwen3", **_FIELDS)
  fakes.write_tokenizer(directory)
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  log = directory.with_name("server.log")
  with log.open("wb") as file:
    process = subprocess.Popen(
      [
        _PYTHON,
        "-m",
        "scripts.serve",
        "--engine=vllm",
        "--role=policy",
        f"--model={directory}",
        f"--port={port}",
        "--kv_cache_gib=0.1",
        "--enforce_eager",
      ],
      cwd=_ROOT,
      stdout=file,
      stderr=subprocess.STDOUT,
      env={
        **{
          name: value
          for name, value in os.environ.items()
          if name not in ("XLA_FLAGS", "JAX_PLATFORMS")
        },
        # Skips compiling the function that ranks tokens; ranks are unused.
        "TORCHDYNAMO_DISABLE": "1",
      },
    )
  client = httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60.0)
  try:
    _wait_until_healthy(process, client, log)
    yield _Server(process, client, directory, model, params)
  finally:
    client.close()
    process.terminate()
    try:
      process.wait(60)
    finally:
      process.kill()


def _wait_until_healthy(process, client, log):
  deadline = time.monotonic() + _START_S
  while time.monotonic() < deadline and process.poll() is None:
    try:
      if client.get("/health").status_code == 200:
        return
    except httpx2.TransportError:
      time.sleep(0.2)
  pytest.fail(f"The server did not start:\n{log.read_text()[-4000:]}")


def _prompts():
  rng = np.random.default_rng(0)
  return [
    (f"row {i}", tuple(rng.integers(3, 300, 3 + 5 * i).tolist()))
    for i in range(4)
  ]


def _sample(model, params, *, temperature):
  sampler = jax_sampler.JaxSampler(
    model,
    params,
    mesh=sharding.make_mesh(data=-1, fsdp=1, tensor=1),
    stop_token_ids=[2],
    max_rows=16,
  )
  prompts = [types.Prompt(row_id, "", ids) for row_id, ids in _prompts()]
  params = types.SamplingParams(1, 12, temperature, 1.0, 0, 0)
  return [group[0] for group in sampler.sample(prompts, params)]


def _assert_agree(answer, model, params):
  """Compares greedy completions: equal tokens, close log-probabilities."""
  expected = _sample(model, params, temperature=0.0)
  given = [group[0] for group in answer.completions]
  assert [tuple(c.token_ids) for c in given] == [c.token_ids for c in expected]
  assert [c.finish_reason for c in given] == [c.finish_reason for c in expected]
  gaps = np.concatenate(
    [
      np.abs(np.subtract(one.logprobs, other.logprobs))
      for one, other in zip(given, expected, strict=True)
    ]
  )
  error = float(np.exp(gaps).mean())
  assert error <= 1.0001, f"mean multiplicative error {error}"


def test_greedy_completions_match_the_jax_sampler(served):
  answer = served.generate("greedy", _prompts(), temperature=0.0)
  _assert_agree(answer, served.model, served.params)
  pair = served.generate("greedy pair", _prompts(), temperature=0.0, n=2)
  for group, (one,) in zip(pair.completions, answer.completions, strict=True):
    assert [c.token_ids for c in group] == [one.token_ids] * 2


def test_completions_depend_on_seed_row_and_index_only(served):
  prompts = _prompts()
  together = served.generate("together", prompts, n=4).completions
  for i, prompt in enumerate(prompts):
    alone = served.generate(f"alone {i}", [prompt], n=2).completions[0]
    assert [c.token_ids for c in alone] == [
      c.token_ids for c in together[i][:2]
    ]
  assert len({tuple(c.token_ids) for c in together[3]}) > 1
  token_ids = prompts[0][1]
  rows = served.generate("rows", [("a", token_ids), ("b", token_ids)])
  assert rows.completions[0][0].token_ids != rows.completions[1][0].token_ids
  seeds = served.generate("seeds", prompts, n=4, seed=1).completions
  assert [c.token_ids for c in seeds[3]] != [c.token_ids for c in together[3]]


def test_logprobs_are_of_the_sampling_distribution(served):
  plain = served.generate("plain", _prompts()).completions
  assert all(c.model_logprobs == c.logprobs for (c,) in plain)
  sharp = served.generate("sharp", _prompts(), temperature=0.01).completions
  cut = served.generate("cut", _prompts(), top_k=1).completions
  assert all(c.model_logprobs is None for (c,) in (*sharp, *cut))
  # With one token left, its probability is 1.
  assert all(math.isclose(x, 0.0) for (c,) in cut for x in c.logprobs)


def test_stop_token_ends_a_completion_and_is_part_of_it(served):
  answer = served.generate("stops", _prompts(), n=32, max_tokens=64)
  flat = [c for group in answer.completions for c in group]
  assert {c.finish_reason for c in flat} == {"stop", "length"}
  for c in flat:
    assert len(c.token_ids) == len(c.logprobs)
    stops = [i for i, token_id in enumerate(c.token_ids) if token_id == 2]
    last = [len(c.token_ids) - 1]
    assert stops == (last if c.finish_reason == "stop" else [])


def test_more_prompts_than_fit_one_engine_step_are_sampled(served):
  # vLLM's CPU step has 2048 tokens; a partial prompt used to crash it.
  prompts = [
    (f"row {i}", [3 + (7 * i + j) % 290 for j in range(110)]) for i in range(40)
  ]
  answer = served.generate("many", prompts)
  assert all(c.token_ids for (c,) in answer.completions)


def test_sampling_uses_pushed_weights(served, tmp_path):
  before = served.generate("before", _prompts(), temperature=0.0)
  params = jax.tree.map(lambda leaf: 1.5 * leaf, served.params)
  root = push.open_root(str(tmp_path / "root"), run="")
  published = push.publish(
    params,
    served.model,
    root,
    1,
    source=served.directory,
    dtype="float32",
    max_shard_bytes=100_000,
  )
  init = wire.InitRequest(
    trainer_id="t",
    process="",
    role="policy",
    tensors=[
      wire.TensorSignature(name=name, shape=list(shape))
      for name, shape in rules.shapes(served.model).items()
    ],
    tokenizer_digest=manifest.tokenizer_digest(served.directory),
    weights_root=str(root),
    heartbeat_s=60.0,
  )
  reply = served.client.post("/init_communicator", json=init.model_dump())
  assert reply.status_code == 200, reply.text
  body = {"trainer_id": "t", "version": 1, "digest": published.digest}
  reply = served.client.post("/update_weights", json=body)
  assert reply.status_code == 200, reply.text
  assert reply.json()["load_s"] > 0.0

  after = served.generate("after", _prompts(), temperature=0.0, version=1)
  assert after.version == 1
  assert before.completions != after.completions
  _assert_agree(after, served.model, params)


def test_health_responds_during_generation(served):
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    running = pool.submit(
      served.generate, "long", _prompts(), n=48, max_tokens=100
    )
    seen, resets = [], []
    while not running.done():
      health = served.client.get("/health", timeout=5.0).json()
      seen.append((health["status"], health["num_running"]))
      if health["num_running"] and not resets:
        resets.append(served.client.post("/reset_prefix_cache"))
    running.result()
  # vLLM keeps the cache while requests use it.
  assert [reply.status_code for reply in resets] == [503]
  assert served.client.post("/reset_prefix_cache").status_code == 200
  assert ("ok", 4 * 48) in seen
  metrics = served.client.get("/metrics").text
  assert "atlas_rollout_engine_kv_cache_usage" in metrics
  assert "atlas_rollout_engine_queue_seconds_total" in metrics


def test_a_killed_engine_process_is_reported_immediately(served):
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    running = pool.submit(
      served.client.post,
      "/generate",
      json=served.request("lost", n=48, max_tokens=100),
    )
    while not served.client.get("/health").json()["num_running"]:
      assert not running.done()
    os.kill(_engine_of(served.process.pid), signal.SIGKILL)
    start = time.monotonic()
    assert running.result().status_code == 503
    assert time.monotonic() - start < 5.0
  reply = served.client.get("/health", timeout=5.0)
  assert (reply.status_code, reply.json()["status"]) == (503, "dead")
  reply = served.client.post("/generate", json=served.request("late"))
  assert reply.status_code == 503


def _engine_of(pid):
  """Returns the pid of vLLM's engine process."""
  children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text()
  (engine,) = (
    int(child)
    for child in children.split()
    if "EngineCore" in pathlib.Path(f"/proc/{child}/cmdline").read_text()
  )
  return engine


def test_sigterm_exits_with_zero_even_with_a_dead_engine(served):
  served.process.send_signal(signal.SIGTERM)
  assert served.process.wait(60) == 0
