# SPDX-License-Identifier: Apache-2.0
"""Tests workdir locking, signals, and opening of models and adapters."""

import dataclasses
import json
import os
import signal

import jax
import ml_collections
from ml_collections import config_dict
import numpy as np
import pytest

from atlas_jax import errors, sharding
from atlas_jax.models import lora, quantized
from atlas_jax.train import train_state, trainable
from conversion import card, load, peft_adapters, save
from rollout import sampler
from scripts.job import components, exports
from tests import tiny

_SHAPE = {"num_hidden_layers": 1}
_MODEL = {
  "dtype": "float32",
  "param_dtype": "float32",
  "attention": "xla",
  "remat": "none",
  "unroll": 1,
}


def _config(**changes):
  config = ml_collections.ConfigDict(
    {
      "seed": 1,
      "data": {"path": "data.jsonl"},
      "world": {"directory": ""},
    }
  )
  config.update_from_flattened_dict(changes)
  return config


def _mesh(**sizes):
  return sharding.make_mesh(**{"data": 1, "fsdp": -1, "tensor": 1, **sizes})


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
  directory = tmp_path_factory.mktemp("models") / "talker"
  model, params = tiny.write_talker(directory, **_SHAPE)
  return directory, model, params


def test_a_config_without_data_raises_before_writing(tmp_path):
  config = _config()
  config.data.path = config_dict.placeholder(str)
  with (
    pytest.raises(errors.ConfigError, match=r"--config\.data\.path"),
    components.start(tmp_path / "run", config),
  ):
    pass
  assert not (tmp_path / "run").exists()


def test_training_a_quantized_model_raises_before_reading(tmp_path):
  config = _config()
  config.model = {**_MODEL, "path": "absent", "param_dtype": "nf4"}
  config.lora = {"rank": 0}
  with (
    pytest.raises(errors.ConfigError, match="nf4 cannot be trained"),
    components.start(tmp_path / "run", config),
  ):
    pass
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("param_dtype", "rank", "rounding", "message"),
  [
    ("bfloat16", 0, "nearest", "bfloat16 cannot be trained"),
    ("bfloat16", 4, "stochastic", "requires trained parameters in bfloat16"),
    ("float32", 0, "stochastic", "requires trained parameters in bfloat16"),
  ],
)
def test_a_rounding_that_loses_updates_raises_before_reading(
  tmp_path, param_dtype, rank, rounding, message
):
  config = _config()
  config.model = {**_MODEL, "path": "absent", "param_dtype": param_dtype}
  config.lora = {"rank": rank}
  config.optimizer = {"rounding": rounding}
  with (
    pytest.raises(errors.ConfigError, match=message),
    components.start(tmp_path / "run", config),
  ):
    pass
  assert not (tmp_path / "run").exists()


def test_a_workdir_belongs_to_one_run_at_a_time(tmp_path):
  with components.start(tmp_path, _config()):
    with (
      pytest.raises(errors.ConfigError, match="Another run") as caught,
      components.start(tmp_path, _config(seed=2)),
    ):
      pass
    assert f"process {os.getpid()}" in caught.value.why
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 1
  with components.start(tmp_path, _config()):
    pass


def test_an_unwritable_workdir_raises(tmp_path):
  (tmp_path / "file").write_text("")
  with (
    pytest.raises(errors.ConfigError, match="not writable"),
    components.start(tmp_path / "file/run", _config()),
  ):
    pass


def test_current_and_previous_configs_are_saved(tmp_path):
  for seed in (1, 1, 2, 3):
    with components.start(tmp_path, _config(seed=seed)):
      pass
  seeds = {
    path.name: json.loads(path.read_text())["seed"]
    for path in tmp_path.glob("config*.json")
  }
  assert seeds == {"config.0.json": 1, "config.1.json": 2, "config.json": 3}


def test_a_signal_requests_a_stop(tmp_path):
  with components.start(tmp_path, _config()) as should_stop:
    assert not should_stop()
    os.kill(os.getpid(), signal.SIGTERM)
    assert should_stop()


@pytest.mark.parametrize(
  "error",
  [
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating"),
    MemoryError("Unable to allocate 4. TiB"),
  ],
)
def test_out_of_memory_errors_suggest_fixes(tmp_path, error):
  with (
    pytest.raises(errors.OutOfMemoryError, match="out of memory") as caught,
    components.start(tmp_path, _config()),
  ):
    raise error
  assert caught.value.exit_code == 70
  assert str(error).partition(":")[0] in caught.value.why


def test_other_device_errors_propagate(tmp_path):
  error = jax.errors.JaxRuntimeError("INTERNAL: lost")
  with (
    pytest.raises(jax.errors.JaxRuntimeError, match="lost"),
    components.start(tmp_path, _config()),
  ):
    raise error


def test_a_model_is_sharded_over_the_mesh(talker):
  directory, _, params = talker
  mesh = _mesh(fsdp=4, tensor=2)
  opened = components.open_model(mesh, path=str(directory), **_MODEL)
  jax.tree.map(np.testing.assert_array_equal, opened.params, params)
  places = sharding.of_params(mesh, opened.model.abstract_params)
  assert jax.tree.map(lambda leaf: leaf.sharding, opened.params) == places


def _break_config(directory, **changes):
  path = directory / "config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
  ("damage", "kind", "match"),
  [
    (
      lambda path: _break_config(path, model_type="mamba"),
      errors.CheckpointError,
      "mamba",
    ),
    (
      lambda path: (path / "chat_template.jinja").unlink(),
      errors.ConfigError,
      "no chat template",
    ),
    (
      lambda path: (path / "model.safetensors").unlink(),
      errors.CheckpointError,
      "safetensors",
    ),
  ],
)
def test_an_unusable_model_raises(tmp_path, damage, kind, match):
  tiny.write_talker(tmp_path / "model", **_SHAPE)
  damage(tmp_path / "model")
  with pytest.raises(kind, match=match):
    components.open_model(_mesh(), path=str(tmp_path / "model"), **_MODEL)


def test_ignored_fields_open_a_model_and_stay_in_its_export(tmp_path):
  directory = tmp_path / "model"
  model, params = tiny.write_talker(directory, **_SHAPE)
  _break_config(directory, final_logit_softcapping=30.0)
  ignored = ("final_logit_softcapping",)
  opened = components.open_model(
    _mesh(), path=str(directory), **_MODEL, ignore_fields=ignored
  )
  assert opened.model.config == model.config
  # A run can resume from a checkpoint of before the key existed.
  identity = trainable.full_policy(opened.model).identity()
  assert "model.ignored_fields" not in identity
  save.save(
    tmp_path / "export",
    opened.params,
    opened.model,
    source=directory,
    dtype="float32",
    max_shard_bytes=10**9,
    about=card.Card(base="test"),
    overwrite=False,
  )
  written = (tmp_path / "export/config.json").read_text()
  assert "final_logit_softcapping" in written
  jax.tree.map(np.testing.assert_array_equal, opened.params, params)


def test_a_quantized_base_is_dequantized_to_sample_and_export(tmp_path):
  shape = {**tiny.blocks("qwen2"), **_SHAPE}
  del shape["vocab_size"]  # The tokenizer's is used.
  tiny.write_talker(tmp_path / "base", **shape)
  mesh = _mesh(data=2, fsdp=2, tensor=2)
  settings = {**_MODEL, "param_dtype": "nf4", "remat": "dots"}
  opened = components.open_model(mesh, path=str(tmp_path / "base"), **settings)
  policy, trained = components.open_policy(
    opened,
    mesh,
    seed=0,
    path="",
    rank=2,
    alpha=4.0,
    targets=("attention/q", "mlp/up"),
  )
  trained = jax.tree.map(lambda leaf: leaf + 0.1, trained)
  exports.write(
    tmp_path,
    opened,
    policy,
    trained,
    None,
    facts={},
    enabled=True,
    keep_steps=0,
    dtype="float32",
    max_shard_bytes=10**9,
  )

  written = load.load(
    tmp_path / "export",
    opened.model,
    param_dtype="float32",
    shardings=sharding.of_params(mesh, opened.model.abstract_params),
  )
  batch = tiny.batch(opened.model, batch_size=8)
  expected = jax.jit(policy.model.logits)(policy.all_params(trained), *batch)
  got = jax.jit(opened.model.logits)(written, *batch)
  np.testing.assert_allclose(got, expected, atol=2e-4)
  text = (tmp_path / "export/README.md").read_text()
  assert "Base quantized to: nf4" in text
  adapter_card = (tmp_path / "adapter/README.md").read_text()
  assert "over the quantized base" in adapter_card

  (sampled,) = _weights_published(opened, mesh)
  whole = quantized.whole(opened.params, np.dtype(np.float32))
  jax.tree.map(np.testing.assert_array_equal, sampled, whole)


def _weights_published(opened, mesh):
  """Yields the initial parameters of an in-process sampler."""
  with sampler.open_sampler(
    "policy",
    sampler.Settings("jax", (), (), "", "float32", 1.0, 1.0, 1.0),
    directory=opened.directory,
    model=opened.model,
    params=opened.params,
    tokenizer=opened.tokenizer,
    mesh=mesh,
    max_rows=8,
  ) as opened_sampler:
    held = opened_sampler._params
  layers = jax.tree.map(lambda *leaves: np.stack(leaves), *held["layers"])
  yield {**held, "layers": layers}


def test_a_mesh_that_does_not_divide_the_model_raises(talker):
  mesh = _mesh(fsdp=1, tensor=8)
  with pytest.raises(errors.ConfigError, match=r"--config\.mesh\.tensor=8"):
    components.open_model(mesh, path=str(talker[0]), **_MODEL)


def test_offloading_activations_without_host_memory_raises(talker, monkeypatch):
  monkeypatch.setattr(train_state, "_HOST", "memory_of_nobody")
  with pytest.raises(errors.ConfigError, match="Offloading needs") as caught:
    components.open_model(
      _mesh(), path=str(talker[0]), **{**_MODEL, "remat": "offload"}
    )
  assert caught.value.where == "--config.model.remat=offload"


def test_activations_are_sharded_over_the_mesh(talker):
  mesh = _mesh()
  opened = components.open_model(mesh, path=str(talker[0]), **_MODEL)
  assert opened.model.layout == sharding.of_activations(mesh)


def test_roles_use_the_seed_and_evaluation_its_own_group_sizes(talker):
  opened = components.open_model(_mesh(), path=str(talker[0]), **_MODEL)
  draw = {
    "group_size": 1,
    "max_completion_tokens": 4,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
  }
  config = ml_collections.ConfigDict(
    {
      "seed": 11,
      "sampler": {"max_rows": 8},
      "rollout": {
        "backend": "jax",
        "policy_urls": (),
        "student_urls": (),
        "weights_root": "",
        "dtype": "float32",
        "wait_s": 1.0,
        "generate_s": 1.0,
        "update_s": 1.0,
      },
      "roles": {
        "policy": {"max_prompt_tokens": 0},
        "student": {"max_prompt_tokens": 9, "max_thinking_tokens": 7},
      },
      "templates": {
        "probe": "{question}",
        "teach": "{question}{probe}",
        "taught": "{question}{teaching}",
        "baseline": "{question}",
      },
      "sampling": dict.fromkeys(("probe", "baseline", "teach", "solve"), draw),
      "evaluation": {"num_baselines": 3, "num_teachings": 1, "num_answers": 2},
    }
  )
  with components.open_protocol(opened, opened, _mesh(), config) as found:
    assert found.baseline_params.seed == found.teach_params.seed == 11
    assert found.policy.sampler is not found.student.sampler
    assert found.policy.max_prompt_tokens == 0
    assert found.student.max_prompt_tokens == 9
    assert found.student.max_thinking_tokens == 7
    evaluation = components.evaluation_rollouts(found, config)
  assert evaluation.roles == found.roles
  assert evaluation.probe_params == found.probe_params
  for phase, group_size in (("baseline", 3), ("teach", 1), ("solve", 2)):
    params, trained = (
      getattr(each, f"{phase}_params") for each in (evaluation, found)
    )
    assert params == dataclasses.replace(trained, group_size=group_size)


def test_loaded_adapters_are_sharded_like_new_ones(talker, tmp_path):
  directory, model, _ = talker
  settings = {"rank": 2, "alpha": 4.0, "targets": ("attention/[qv]",)}
  abstract = lora.only(lora.adapt(model, lora.Lora(**settings)).abstract_params)
  adapters = lora.init(jax.random.key(5), abstract)
  peft_adapters.save_directory(
    tmp_path / "adapter",
    adapters,
    model,
    settings=lora.Lora(**settings),
    source=directory,
    about=card.Card(base=""),
  )
  mesh = _mesh(data=2, fsdp=2, tensor=2)
  opened = components.open_model(mesh, path=str(directory), **_MODEL)

  path = str(tmp_path / "adapter")
  _, started = components.open_policy(
    opened, mesh, seed=0, path=path, **settings
  )
  _, drawn = components.open_policy(opened, mesh, seed=0, path="", **settings)

  jax.tree.map(np.testing.assert_array_equal, started, adapters)
  places = [jax.tree.map(lambda x: x.sharding, t) for t in (started, drawn)]
  assert places[0] == places[1]
  off = {**settings, "rank": 0}
  with pytest.raises(errors.ConfigError, match=r"lora\.rank=2"):
    components.open_policy(opened, mesh, seed=0, path=path, **off)
