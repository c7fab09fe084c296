# SPDX-License-Identifier: Apache-2.0
"""Both backends return the same completions for the same calls."""

import jax
import numpy as np
import pytest

from atlas_jax import chat, errors, sharding, types
from atlas_jax.models import quantized
from conversion import card, load, process_group, save
from rollout import sampler
from rollout.remote import client, push
from tests import fakes, processes, tiny

_PARAMS = types.SamplingParams(
  group_size=3,
  max_completion_tokens=8,
  temperature=1.0,
  top_p=1.0,
  top_k=0,
  seed=5,
)


def _settings(**changes):
  return sampler.Settings(
    **{
      "backend": "jax",
      "policy_urls": (),
      "student_urls": (),
      "weights_root": "",
      "dtype": "float32",
      "wait_s": 120.0,
      "generate_s": 120.0,
      "update_s": 120.0,
      **changes,
    }
  )


@pytest.mark.parametrize(
  ("changes", "where"),
  [
    ({"backend": "grpc"}, "backend"),
    ({"student_urls": ("http://h",)}, "student_urls"),
  ],
)
def test_settings_that_would_be_ignored_are_rejected(changes, where):
  with pytest.raises(errors.ConfigError) as caught:
    _settings(**changes)
  assert caught.value.where == f"--config.rollout.{where}"


@pytest.mark.parametrize("role", ["policy", "student"])
def test_a_role_without_servers_is_rejected(role):
  settings = _settings(backend="http")
  with pytest.raises(errors.ConfigError) as caught:
    settings.urls(role)
  assert caught.value.where == f"--config.rollout.{role}_urls"


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
  """Returns the arguments of `open_sampler` for a tiny model."""
  folder = tmp_path_factory.mktemp("model")
  sizes = {"vocab_size": 300}
  source = tiny.write_source(folder / "source", "qwen3", **sizes)
  fakes.write_tokenizer(source)
  model = tiny.build("qwen3", **sizes)
  params = tiny.params_of(model)
  save.save(
    folder / "model",
    params,
    model,
    source=source,
    dtype="float32",
    max_shard_bytes=10**9,
    about=card.Card(base="test"),
    overwrite=False,
  )
  return {
    "directory": folder / "model",
    "model": model,
    "params": params,
    "tokenizer": chat.load_tokenizer(folder / "model"),
    "mesh": sharding.make_mesh(data=1, fsdp=-1, tensor=1),
    "max_rows": 64,
  }


def test_a_quantized_base_is_pushed_with_its_rounding(opened, tmp_path):
  model, source = opened["model"], opened["directory"]
  kept = load.load(source, model, param_dtype="int8")
  sampler._publish(
    kept,
    3,
    model=model,
    root=tmp_path,
    source=source,
    dtype="float32",
    share=process_group.ALONE,
  )
  (published,) = tmp_path.iterdir()
  got = load.load(published, model, param_dtype="float32")
  jax.tree.map(
    np.testing.assert_array_equal, got, quantized.whole(kept, model.dtype)
  )


@pytest.fixture(scope="module")
def servers(opened):
  both = [
    processes.Server(role, opened["directory"])
    for role in ("policy", "student")
  ]
  try:
    for server in both:
      server.wait()
    yield both
  finally:
    for server in both:
      server.stop()


@pytest.fixture
def http(servers, tmp_path):
  policy, student = servers
  return _settings(
    backend="http",
    policy_urls=(policy.url,),
    student_urls=(student.url,),
    weights_root=str(tmp_path / "weights"),
  )


def _prompts(count):
  drawn = np.random.default_rng(0).integers(3, 300, size=(count, 12)).tolist()
  return [
    types.Prompt(row_id=f"row{i}", text="", token_ids=tuple(row[: 3 + i]))
    for i, row in enumerate(drawn)
  ]


def _compare(actual, expected):
  for ours, theirs in zip(actual, expected, strict=True):
    for one, other in zip(ours, theirs, strict=True):
      assert one.token_ids == other.token_ids
      assert one.finish_reason == other.finish_reason
      assert one.version == other.version
      np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
      np.testing.assert_allclose(
        one.model_logprobs, other.model_logprobs, atol=1e-5
      )


@pytest.mark.slow
def test_servers_match_sampling_in_process(servers, opened, http):
  del servers
  other = tiny.params_of(opened["model"], seed=3)
  for role in ("policy", "student"):
    with (
      sampler.open_sampler(role, http, **opened) as remote,
      sampler.open_sampler(role, _settings(), **opened) as local,
    ):
      if role == "policy":
        assert remote.version == -1
        remote.update_weights(opened["params"], 0)
      assert remote.version == local.version == 0
      first = local.sample(_prompts(6), _PARAMS)
      _compare(remote.sample(_prompts(6), _PARAMS), first)
      if role == "policy":
        for each in (remote, local):
          each.update_weights(other, 4)
        second = local.sample(_prompts(6), _PARAMS)
        _compare(remote.sample(_prompts(6), _PARAMS), second)
        assert [c.token_ids for g in first for c in g] != [
          c.token_ids for g in second for c in g
        ]


@pytest.mark.slow
def test_a_restarted_server_gets_the_weights_again(servers, opened, http):
  policy, _ = servers
  other = tiny.params_of(opened["model"], seed=3)
  with (
    sampler.open_sampler("policy", http, **opened) as remote,
    sampler.open_sampler("policy", _settings(), **opened) as local,
  ):
    for each in (remote, local):
      each.update_weights(other, 7)
    policy.stop()
    policy.start()
    _compare(
      remote.sample(_prompts(3), _PARAMS), local.sample(_prompts(3), _PARAMS)
    )


@pytest.mark.slow
def test_a_second_trainer_is_rejected(
  servers, opened, http, tmp_path, monkeypatch
):
  del servers
  monkeypatch.setattr(sampler, "_HEARTBEAT_S", 5.0)
  hasty = dict(http.__dict__, wait_s=1.0, weights_root=str(tmp_path / "b"))
  with sampler.open_sampler("policy", http, **opened) as first:
    with (
      pytest.raises(errors.RolloutError, match="No rollout server") as caught,
      sampler.open_sampler("policy", _settings(**hasty), **opened),
    ):
      pass
    assert "trainers would overwrite" in caught.value.why
    first.update_weights(opened["params"], 0)
    assert first.sample(_prompts(1), _PARAMS)


@pytest.mark.slow
def test_weights_are_pushed_once_and_removed_after_training(
  servers, opened, http, tmp_path
):
  del servers
  with sampler.open_sampler("policy", http, **opened) as remote:
    # A resumed run pushes those of its checkpoint.
    assert not list((tmp_path / "weights").iterdir())
    for version in (1, 2, 3):
      remote.update_weights(opened["params"], version)
    names = {path.name for path in (tmp_path / "weights").iterdir()}
    assert names == {"2", "3"}
  assert not list((tmp_path / "weights").iterdir())


@pytest.mark.slow
def test_corrupt_weights_are_rejected_and_change_nothing(
  servers, opened, http, monkeypatch
):
  del servers
  publish = push.publish

  def corrupt(*args, **kwargs):
    published = publish(*args, **kwargs)
    (path,) = published.path.glob("*.safetensors")
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    return published

  with sampler.open_sampler("policy", http, **opened) as remote:
    remote.update_weights(opened["params"], 0)
    before = remote.sample(_prompts(2), _PARAMS)
    with monkeypatch.context() as patched:
      patched.setattr(push, "publish", corrupt)
      with pytest.raises(client.RefusedError, match="Invalid pushed weights"):
        remote.update_weights(tiny.params_of(opened["model"], seed=3), 1)
    assert remote.version == 0
    _compare(remote.sample(_prompts(2), _PARAMS), before)
