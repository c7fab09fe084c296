# SPDX-License-Identifier: Apache-2.0
"""An export is written completely or not at all."""

import json
import os
import resource
import shutil
import socket

import jax
import jax.numpy as jnp
import pytest

from atlas_jax import errors, sharding
from conversion import arrays, card, load, rules, save, shards
from tests import tiny


def _save(directory, params, model, source, **changes):
  arguments = {
    "source": source,
    "dtype": "float32",
    "max_shard_bytes": 10**9,
    "about": card.Card(base="test"),
    "overwrite": False,
    **changes,
  }
  save.save(directory, params, model, **arguments)


@pytest.fixture
def job(tmp_path):
  """Returns parameters, their model and their source directory."""
  model = tiny.build("qwen2")
  source = tiny.write_source(tmp_path / "source", "qwen2")
  return tiny.params_of(model), model, source


def test_export_has_all_files_for_serving(tmp_path, job):
  params, model, source = job
  _save(
    tmp_path / "out",
    params,
    model,
    source,
    about=card.Card(base="b", facts={"step": "7\n# x"}),
  )

  assert {path.name for path in (tmp_path / "out").iterdir()} == {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "README.md",
  }
  generation = (tmp_path / "out" / "generation_config.json").read_text()
  assert json.loads(generation) == {"eos_token_id": 2, "pad_token_id": 0}
  assert "- step: 7 # x\n" in (tmp_path / "out" / "README.md").read_text()


def test_copied_and_missing_files_are_described(tmp_path, job):
  params, model, source = job
  (source / "notes.txt").write_text("mine")
  _save(tmp_path / "a", params, model, source)
  names = save.carried(source)
  assert names == [
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
  ]
  for name in names:
    copy = tmp_path / "a" / name
    assert copy.read_bytes() == (source / name).read_bytes()
  made = f"generation_config.json is derived from {source / 'config.json'}."
  listed = f"Copied: {', '.join(names)}."
  assert save.describe_carried(source) == f"{listed} {made}"

  (source / "generation_config.json").write_text("{}")
  assert "is derived" not in save.describe_carried(source)
  (source / "chat_template.jinja").unlink()
  assert "Without a chat template" in save.describe_carried(source)
  _save(tmp_path / "b", params, model, source)
  (source / "tokenizer_config.json").write_text('{"chat_template": "{{ x }}"}')
  assert "Without a chat template" not in save.describe_carried(source)


def test_a_chat_template_replaces_that_of_the_source(tmp_path, job):
  params, model, source = job
  _save(tmp_path / "out", params, model, source, chat_template="{{ mine }}")
  assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ mine }}"


def test_generation_settings_are_copied(tmp_path, job):
  params, model, source = job
  (source / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
  _save(tmp_path / "out", params, model, source)
  text = (tmp_path / "out" / "generation_config.json").read_text()
  assert text == '{"eos_token_id": [2, 3]}'


def test_config_sets_the_dtype_key_of_the_source(tmp_path, job):
  params, model, source = job
  older = tiny.fields("qwen2")
  older["torch_dtype"] = older.pop("dtype")
  (source / "config.json").write_text(json.dumps(older))
  _save(tmp_path / "out", params, model, source, dtype="bfloat16")
  fields = json.loads((tmp_path / "out" / "config.json").read_text())
  assert fields == {**older, "torch_dtype": "bfloat16"}


def test_tied_head_is_not_written(tmp_path):
  tiny.write_checkpoint(tmp_path / "hf", "llama", tie_word_embeddings=True)
  assert "lm_head.weight" not in shards.open_directory(tmp_path / "hf")


def test_sharded_parameters_are_written_identically(tmp_path):
  changes = {
    "vocab_size": 38,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
  }
  model, params = tiny.write_checkpoint(tmp_path / "one", "qwen3", **changes)
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  places = sharding.of_params(mesh, model.abstract_params)
  source = tmp_path / "one-source"
  _save(tmp_path / "many", jax.device_put(params, places), model, source)
  assert tiny.differing(tmp_path / "one", tmp_path / "many") == []


def test_target_in_use_is_rejected_and_kept(tmp_path, job):
  params, model, source = job
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "notes.txt").write_text("mine")
  with pytest.raises(errors.ConfigError, match="Remove it"):
    _save(tmp_path / "out", params, model, source)
  assert os.listdir(tmp_path / "out") == ["notes.txt"]


def test_empty_target_is_accepted(tmp_path, job):
  params, model, source = job
  (tmp_path / "out").mkdir()
  _save(tmp_path / "out", params, model, source)
  assert (tmp_path / "out" / "config.json").exists()


def test_overwriting_replaces_the_whole_directory(tmp_path, job):
  params, model, source = job
  _save(tmp_path / "out", params, model, source, max_shard_bytes=3000)
  doubled = jax.tree.map(lambda x: 2 * x, params)
  _save(tmp_path / "out", doubled, model, source, overwrite=True)

  got = load.load(tmp_path / "out", model, param_dtype="float32")
  assert jnp.array_equal(
    got["embed"]["embedding"], doubled["embed"]["embedding"]
  )
  assert sorted(os.listdir(tmp_path)) == ["out", "source"]


def test_source_and_files_are_never_overwritten(tmp_path, job):
  params, model, source = job
  (tmp_path / "file").write_text("mine")
  for target in (source, tmp_path / "file"):
    with pytest.raises(errors.ConfigError):
      _save(target, params, model, source, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_interrupted_export_leaves_no_files(
  tmp_path, job, monkeypatch, overwrite
):
  params, model, source = job
  if overwrite:
    _save(tmp_path / "out", params, model, source)
  before = sorted(tmp_path.rglob("*"))
  calls = []

  def stop_at_the_second(name, array):
    del name, array
    calls.append(sorted(path.name for path in tmp_path.iterdir()))
    if len(calls) == 2:
      raise KeyboardInterrupt

  monkeypatch.setattr(arrays, "check_finite", stop_at_the_second)
  with pytest.raises(KeyboardInterrupt):
    _save(tmp_path / "out", params, model, source, overwrite=overwrite)

  # The private directory beside the target was removed.
  assert any(name.startswith("out.tmp-") for name in calls[0])
  assert ("out" in calls[0]) == overwrite
  assert sorted(tmp_path.rglob("*")) == before


def test_leftovers_of_a_killed_export_are_removed(tmp_path, job):
  params, model, source = job
  name = f"out.tmp-{socket.gethostname()}-{os.getpid()}"
  (tmp_path / name / "model").mkdir(parents=True)
  _save(tmp_path / "out", params, model, source)
  assert sorted(os.listdir(tmp_path)) == ["out", "source"]


def test_non_finite_value_is_rejected_by_name(tmp_path, job):
  params, model, source = job
  scale = params["final_norm"]["scale"]
  bad = {**params, "final_norm": {"scale": scale.at[0].set(jnp.nan)}}
  with pytest.raises(errors.CheckpointError) as caught:
    _save(tmp_path / "out", bad, model, source)
  assert caught.value.where == "model.norm.weight"
  assert sorted(os.listdir(tmp_path)) == ["source"]


def test_full_disk_is_detected_before_writing(tmp_path, job, monkeypatch):
  params, model, source = job
  usage = shutil.disk_usage(tmp_path)._replace(free=1000)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
  with pytest.raises(errors.CheckpointError, match="1,000 are free"):
    _save(tmp_path / "out", params, model, source)
  assert sorted(os.listdir(tmp_path)) == ["source"]


def test_file_size_limit_leaves_no_files(tmp_path, job):
  params, model, source = job
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, limits[1]))
  try:
    with pytest.raises(errors.CheckpointError, match="File too large"):
      _save(tmp_path / "out", params, model, source)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert sorted(os.listdir(tmp_path)) == ["source"]


def test_disk_error_leaves_no_files(tmp_path, job, monkeypatch):
  params, model, source = job

  def fail(handle):
    raise OSError(28, "No space left on device", str(handle))

  monkeypatch.setattr(os, "fsync", fail)
  with pytest.raises(errors.CheckpointError, match="No space left"):
    _save(tmp_path / "out", params, model, source)
  assert sorted(os.listdir(tmp_path)) == ["source"]


def test_source_of_another_shape_is_rejected(tmp_path, job):
  params, model, _ = job
  other = tiny.write_source(tmp_path / "other", "qwen2", rms_norm_eps=1e-5)
  with pytest.raises(errors.CheckpointError, match="does not match the model"):
    _save(tmp_path / "out", params, model, other)


def test_source_without_tokenizer_is_rejected(tmp_path, job):
  params, model, source = job
  (source / "tokenizer.json").unlink()
  with pytest.raises(errors.CheckpointError, match="no tokenizer"):
    _save(tmp_path / "out", params, model, source)


@pytest.mark.parametrize(
  "fields",
  [
    {"model": {"vocab": {"a": 0, "b": 37}}},
    {"model": {"vocab": [["a", -1.0]] * 38}},
    {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 37}]},
  ],
)
def test_tokenizer_with_a_larger_vocabulary_is_rejected(tmp_path, job, fields):
  params, model, source = job
  (source / "tokenizer.json").write_text(json.dumps(fields))
  with pytest.raises(errors.CheckpointError, match="id is 37") as caught:
    _save(tmp_path / "out", params, model, source)
  assert caught.value.where.endswith("tokenizer.json")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_of_a_tied_model_hold_each_tensor_once(tmp_path, dtype):
  model, params = tiny.write_checkpoint(
    tmp_path / "hf", "llama", dtype=dtype, shard=1000, tie_word_embeddings=True
  )
  index = json.loads((tmp_path / "hf" / shards.INDEX_NAME).read_text())
  sizes = [
    tensor.end - tensor.begin
    for tensor in shards.open_directory(tmp_path / "hf").values()
  ]
  assert index["weight_map"].keys() == rules.shapes(model).keys()
  assert index["metadata"]["total_size"] == sum(sizes)
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert sum(sizes) == count * jnp.dtype(dtype).itemsize


def test_unknown_dtype_is_rejected(tmp_path, job):
  params, model, source = job
  with pytest.raises(ValueError, match="float16"):
    _save(tmp_path / "out", params, model, source, dtype="float16")
