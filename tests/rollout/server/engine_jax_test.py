# SPDX-License-Identifier: Apache-2.0
"""The JAX engine on a server matches the JAX sampler in process."""

import asyncio
import json
import shutil
import threading

import httpx2
import jax
import pytest

from atlas_jax import errors, sharding, types
from conversion import load
from rollout import jax_sampler, manifest, wire
from rollout.remote import push
from rollout.server import admission, app, engine_jax, service, weight_channel
from tests import fakes, tiny

_LIMITS = service.Limits(
  max_body_bytes=2**20,
  max_total_body_bytes=2**24,
  max_text_chars=1000,
  max_prompts=8,
  max_n=8,
  max_tokens=64,
  max_queue=64,
  hang_s=60.0,
  drain_s=60.0,
  load_s=60.0,
)
_FIELDS = {"vocab_size": 300}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  directory = tmp_path_factory.mktemp("jax") / "model"
  model, params = tiny.write_checkpoint(directory, "qwen2", **_FIELDS)
  fakes.write_tokenizer(directory)
  return directory, model, params


@pytest.fixture(scope="module")
def engine(checkpoint):
  started = engine_jax.JaxEngine(
    checkpoint[0], dtype="float32", max_model_len=None, max_rows=16
  )
  yield started
  started.close()


def test_a_base_model_needs_no_chat_template(checkpoint, tmp_path):
  shutil.copytree(checkpoint[0], tmp_path / "base")
  (tmp_path / "base/chat_template.jinja").unlink()
  started = engine_jax.JaxEngine(
    tmp_path / "base", dtype="float32", max_model_len=None, max_rows=16
  )
  assert started.tokenize("2 + 2")
  started.close()


def _app(directory, engine):
  digest = manifest.tokenizer_digest(directory)
  weights = weight_channel.Channel(
    role="policy",
    shapes=manifest.shapes_of(directory),
    tokenizer_digest=digest,
    allowed_root=None,
  )
  backend = service.Service(
    engine,
    weights,
    role="policy",
    tokenizer_digest=digest,
    limits=_LIMITS,
  )
  tokens = admission.Tokens(user=None, admin=None)
  return app.create_app(backend, tokens=tokens)


def _client(directory, engine):
  transport = httpx2.ASGITransport(app=_app(directory, engine))
  return httpx2.AsyncClient(transport=transport, base_url="http://test")


def _request(request_id="r", **changes):
  prompts = [
    {"row_id": "a", "token_ids": [5, 6, 7]},
    {"row_id": "b", "token_ids": [8]},
  ]
  return {
    "request_id": request_id,
    "prompts": prompts,
    "n": 2,
    "max_tokens": 8,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "seed": 3,
    **changes,
  }


def _sample(model, params):
  """Samples `_request` in this process."""
  sampler = jax_sampler.JaxSampler(
    model,
    params,
    mesh=sharding.make_mesh(data=-1, fsdp=1, tensor=1),
    stop_token_ids=[2],
    max_rows=16,
  )
  request = _request()
  prompts = [
    types.Prompt(p["row_id"], "", tuple(p["token_ids"]))
    for p in request["prompts"]
  ]
  return sampler.sample(
    prompts, types.SamplingParams(2, 8, 1.0, 1.0, 0, request["seed"])
  )


def _texts(response):
  answer = wire.GenerateResponse.model_validate(response.json())
  return [
    [(tuple(c.token_ids), tuple(c.logprobs)) for c in group]
    for group in answer.completions
  ]


def test_completions_follow_the_weights_that_were_pushed(
  tmp_path, checkpoint, engine
):
  directory, model, params = checkpoint
  root = push.open_root(str(tmp_path / "root"), run="")
  new = jax.tree.map(lambda leaf: 1.5 * leaf, params)
  published = push.publish(
    *(new, model, root, 4),
    source=directory,
    dtype="float32",
    max_shard_bytes=20_000,
  )

  async def test():
    async with _client(directory, engine) as client:
      before = await client.post("/generate", json=_request("a"))
      init = wire.InitRequest(
        trainer_id="t",
        process="",
        role="policy",
        tensors=[
          wire.TensorSignature(name=name, shape=list(shape))
          for name, shape in manifest.shapes_of(directory).items()
        ],
        tokenizer_digest=manifest.tokenizer_digest(directory),
        weights_root=str(root),
        heartbeat_s=60.0,
      )
      reply = await client.post("/init_communicator", json=init.model_dump())
      assert reply.status_code == 200, reply.text
      body = {"trainer_id": "t", "version": 4, "digest": published.digest}
      reply = await client.post("/update_weights", json=body)
      assert reply.status_code == 200, reply.text
      after = await client.post("/generate", json=_request("b", version=4))
      return before, after

  before, after = asyncio.run(test())
  for response, weights in ((before, params), (after, new)):
    expected = [
      [(c.token_ids, c.logprobs) for c in group]
      for group in _sample(model, weights)
    ]
    assert _texts(response) == expected
  assert _texts(before) != _texts(after)
  assert after.json()["version"] == 4
  asyncio.run(engine.load(directory, 0))  # Restores the fixture's weights.


def test_health_responds_while_a_batch_is_sampled(checkpoint, engine):
  go, real = threading.Event(), engine._sampler.sample

  def slow(prompts, params):
    assert go.wait(30)
    return real(prompts, params)

  async def test():
    engine._sampler.sample = slow
    try:
      async with _client(checkpoint[0], engine) as client:
        running = asyncio.create_task(client.post("/generate", json=_request()))
        await asyncio.sleep(0.05)
        health = (await client.get("/health")).json()
        assert (health["status"], health["num_running"]) == ("ok", 4)
        go.set()
        assert (await running).status_code == 200
    finally:
      engine._sampler.sample = real

  asyncio.run(test())


def test_text_is_encoded_without_a_template(checkpoint, engine):
  tokenizer = fakes.write_tokenizer(checkpoint[0])
  text = "What is 12 + 30?"
  token_ids = tokenizer.encode(text, add_special_tokens=False)

  async def test():
    async with _client(checkpoint[0], engine) as client:
      replies = [
        await client.post("/generate", json=_request(str(i), prompts=[prompt]))
        for i, prompt in enumerate(
          [
            {"row_id": "a", "text": text},
            {"row_id": "a", "token_ids": token_ids},
          ]
        )
      ]
      assert _texts(replies[0]) == _texts(replies[1])

  asyncio.run(test())


def test_mismatched_weights_are_rejected_and_change_nothing(
  tmp_path, checkpoint, engine
):
  directory, model, params = checkpoint
  tiny.write_checkpoint(tmp_path / "other", "qwen2", vocab_size=37)
  with pytest.raises(errors.CheckpointError):
    asyncio.run(engine.load(tmp_path / "other", 9))

  async def test():
    async with _client(directory, engine) as client:
      return await client.post("/generate", json=_request())

  expected = _sample(model, params)
  token_ids = [[c[0] for c in group] for group in _texts(asyncio.run(test()))]
  assert token_ids == [[c.token_ids for c in group] for group in expected]


def test_max_model_len_beyond_the_model_is_rejected(checkpoint):
  longest = load.read_config(checkpoint[0])[0].max_positions
  with pytest.raises(errors.ConfigError, match="max_model_len"):
    engine_jax.JaxEngine(
      checkpoint[0], dtype="float32", max_model_len=longest + 1, max_rows=1
    )


def test_ignored_fields_open_an_unsupported_config(checkpoint, tmp_path):
  directory = tmp_path / "model"
  shutil.copytree(checkpoint[0], directory)
  path = directory / "config.json"
  fields = json.loads(path.read_text())
  path.write_text(json.dumps(fields | {"final_logit_softcapping": 30.0}))
  settings = {"dtype": "float32", "max_model_len": None, "max_rows": 1}
  with pytest.raises(errors.CheckpointError, match="final_logit_softcapping"):
    engine_jax.JaxEngine(directory, **settings)
  ignored = ("final_logit_softcapping",)
  started = engine_jax.JaxEngine(directory, **settings, ignore_fields=ignored)
  assert started.facts.vocab_size == fields["vocab_size"]
  started.close()
