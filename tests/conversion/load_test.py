# SPDX-License-Identifier: Apache-2.0
"""Loading of valid and invalid checkpoints."""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax import errors, sharding
from conversion import arrays, load, rules, shards
from tests import tiny

_EVEN = {
  "vocab_size": 38,
  "hidden_size": 24,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
}


def _read_all(directory):
  tensors = shards.open_directory(directory)
  return {name: shards.read(tensor).copy() for name, tensor in tensors.items()}


def _rewrite(directory, tensors):
  """Replaces the weights."""
  for path in directory.glob("model*"):
    path.unlink()
  shapes = {name: array.shape for name, array in tensors.items()}
  shards.write(
    directory, shapes, tensors.get, dtype="float32", max_shard_bytes=10**9
  )


def _assert_equal(got, expected):
  jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_saved_parameters_are_loaded_unchanged(tmp_path, family, tied):
  model, params = tiny.write_checkpoint(
    tmp_path / "hf", family, tie_word_embeddings=tied
  )
  config, fields = load.read_config(tmp_path / "hf")
  assert config == model.config
  assert fields["model_type"] == family
  _assert_equal(
    load.load(tmp_path / "hf", model, param_dtype="float32"), params
  )


def test_each_device_receives_its_shard(tmp_path):
  model, params = tiny.write_checkpoint(
    tmp_path / "hf", "qwen2", shard=4000, **_EVEN
  )
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  shardings = sharding.of_params(mesh, model.abstract_params)

  got = load.load(
    tmp_path / "hf", model, param_dtype="float32", shardings=shardings
  )

  _assert_equal(got, params)
  assert jax.tree.map(lambda x: x.sharding, got) == shardings


@pytest.mark.parametrize(
  ("sizes", "dtype"), [((2, 2, 2), "float32"), ((1, 4, 2), "bfloat16")]
)
def test_each_byte_is_read_once_per_owner(tmp_path, monkeypatch, sizes, dtype):
  model, _ = tiny.write_checkpoint(
    tmp_path / "hf",
    "qwen2",
    dtype=dtype,
    vocab_size=38,
    hidden_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
  )
  data, fsdp, tensor = sizes
  mesh = sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor)
  reads = []
  copy = arrays.copy

  def counted(source, target, look):
    reads.append(source.nbytes)
    copy(source, target, look)

  monkeypatch.setattr(arrays, "copy", counted)
  params = load.load(
    tmp_path / "hf",
    model,
    param_dtype="float32",
    shardings=sharding.of_params(mesh, model.abstract_params),
  )

  tensors = shards.open_directory(tmp_path / "hf").values()
  assert sum(reads) == sum(tensor.end - tensor.begin for tensor in tensors)
  # Replicas share one read; a stacked parameter needs one per layer.
  expected = 0
  for path, leaf in rules.flatten(params):
    slices = {str(shard.index) for shard in leaf.addressable_shards}
    layers = model.config.num_layers if path.startswith("layers") else 1
    expected += layers * len(slices)
  assert len(reads) == expected


def test_cpu_device_uses_the_read_buffer_without_a_copy():
  array = arrays.empty((3, 5), np.dtype(np.float32))
  array[:] = 1
  place = jax.device_put(array, jax.devices()[0]).unsafe_buffer_pointer()
  assert place == array.ctypes.data


def test_overflow_of_the_parameter_dtype_is_rejected(tmp_path):
  model, _ = tiny.write_checkpoint(tmp_path / "hf", "qwen2")
  tensors = _read_all(tmp_path / "hf")
  tensors["model.norm.weight"][3] = 3.4e38
  _rewrite(tmp_path / "hf", tensors)
  load.load(tmp_path / "hf", model, param_dtype="float32")
  with pytest.raises(errors.CheckpointError, match="not finite"):
    load.load(tmp_path / "hf", model, param_dtype="bfloat16")


def test_parameters_have_param_dtype(tmp_path):
  model, params = tiny.write_checkpoint(tmp_path / "hf", "llama")
  got = load.load(tmp_path / "hf", model, param_dtype="bfloat16")
  _assert_equal(got, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
  for other in ("float64", "int4", "fp8"):
    with pytest.raises(errors.ConfigError, match=f"param_dtype: {other}"):
      load.load(tmp_path / "hf", model, param_dtype=other)


def test_all_mismatches_are_in_one_error(tmp_path):
  model, _ = tiny.write_checkpoint(tmp_path / "hf", "qwen2")
  tensors = _read_all(tmp_path / "hf")
  tensors["other.weight"] = tensors.pop("model.norm.weight")
  tensors["lm_head.weight"] = np.zeros((36, 21))
  _rewrite(tmp_path / "hf", tensors)
  with pytest.raises(errors.CheckpointError) as caught:
    load.load(tmp_path / "hf", model, param_dtype="float32")
  assert "Missing: model.norm.weight." in caught.value.why
  assert "Unexpected: other.weight." in caught.value.why
  assert "lm_head.weight is (36, 21), not (37, 21)" in caught.value.why


def test_long_lists_are_shortened(tmp_path):
  model, _ = tiny.write_checkpoint(tmp_path / "hf", "qwen2")
  _rewrite(tmp_path / "hf", {"model.norm.weight": np.zeros(21)})
  with pytest.raises(errors.CheckpointError, match="and 18 more"):
    load.load(tmp_path / "hf", model, param_dtype="float32")


def test_stored_tied_head_must_equal_the_embedding(tmp_path):
  model, params = tiny.write_checkpoint(
    tmp_path / "hf", "llama", tie_word_embeddings=True
  )
  tensors = _read_all(tmp_path / "hf")
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
  _rewrite(tmp_path / "hf", tensors)
  got = load.load(tmp_path / "hf", model, param_dtype="float32")
  _assert_equal(got, params)

  tensors["lm_head.weight"][3, 4] += 1e-6
  _rewrite(tmp_path / "hf", tensors)
  with pytest.raises(errors.CheckpointError, match="tied head"):
    load.load(tmp_path / "hf", model, param_dtype="float32")


def test_stored_rope_frequencies_are_ignored(tmp_path):
  model, params = tiny.write_checkpoint(tmp_path / "hf", "llama")
  tensors = _read_all(tmp_path / "hf")
  tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4)
  _rewrite(tmp_path / "hf", tensors)
  got = load.load(tmp_path / "hf", model, param_dtype="float32")
  _assert_equal(got, params)


def test_non_finite_value_is_rejected_by_name(tmp_path):
  model, _ = tiny.write_checkpoint(tmp_path / "hf", "qwen2")
  name = "model.layers.1.mlp.up_proj.weight"
  tensor = shards.open_directory(tmp_path / "hf")[name]
  with tensor.file.open("r+b") as file:
    file.seek(tensor.begin)
    file.write(np.float32(np.nan).tobytes())
  with pytest.raises(errors.CheckpointError) as caught:
    load.load(tmp_path / "hf", model, param_dtype="float32")
  assert caught.value.where == name


def test_unreadable_config_is_rejected_with_its_path(tmp_path):
  path = tmp_path / "config.json"
  for text in ("{", "[]", "\xff", json.dumps({"model_type": "gpt2"})):
    path.write_text(text, encoding="latin-1")
    with pytest.raises(errors.CheckpointError) as caught:
      load.read_config(tmp_path)
    assert caught.value.where == str(path)
  path.unlink()
  with pytest.raises(errors.CheckpointError, match="missing"):
    load.read_config(tmp_path)


def test_fields_that_transformers_does_not_read_are_logged_once(
  tmp_path, caplog
):
  tiny.write_source(tmp_path / "a", "llama", use_mrope=False, unk_token_id=0)
  tiny.write_source(tmp_path / "b", "llama")
  with caplog.at_level("INFO"):
    for name in ("a", "a", "b"):
      load.read_config(tmp_path / name)
  (line,) = [line for line in caplog.messages if "Ignored fields" in line]
  assert line.endswith("unk_token_id, use_mrope")


def test_file_instead_of_a_directory_is_rejected(tmp_path):
  file = tmp_path / "model.safetensors"
  file.write_bytes(b"")
  with pytest.raises(errors.CheckpointError, match="directory") as caught:
    load.read_config(file)
  assert str(tmp_path) in caught.value.fix


def test_local_directory_resolves_to_itself(tmp_path):
  assert load.resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
  ("name", "fix"),
  [
    ("owner/absent", "HF_HUB_OFFLINE=1 is offline mode"),
    ("owner/absent@main", "HF_HUB_OFFLINE=1 is offline mode"),
    ("a/b/c/d", "WORKDIR/export"),
    ("not there", "WORKDIR/export"),
    ("runs/absent", "WORKDIR/export"),  # The folder `runs` is here.
    ("runs/frist/export", "Did you mean runs/first?"),
    ("/absent/x", "WORKDIR/export"),
  ],
)
def test_unknown_model_name_is_rejected(name, fix, tmp_path, monkeypatch):
  (tmp_path / "runs/first").mkdir(parents=True)
  monkeypatch.chdir(tmp_path)
  with pytest.raises(errors.CheckpointError) as caught:
    load.resolve(name)
  assert caught.value.where == name
  assert fix in caught.value.fix
  assert "HFValidationError" not in str(caught.value)


def test_a_workdir_is_not_a_model(tmp_path):
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(errors.CheckpointError, match="to_hf"):
    load.resolve(str(tmp_path))
  (tmp_path / "export").mkdir()
  (tmp_path / "export/config.json").write_text("{}")
  with pytest.raises(errors.CheckpointError, match=r"Did you mean .*/export\?"):
    load.resolve(str(tmp_path))
  (tmp_path / "model.safetensors").write_text("")
  assert load.resolve(str(tmp_path)) == tmp_path


def test_a_fingerprint_depends_on_weights_not_on_their_path(tmp_path):
  for name, seed in (("a", 0), ("same", 0), ("other", 1)):
    tiny.write_checkpoint(tmp_path / name, "qwen2", seed=seed)
  a, same, other = (
    load.fingerprint(tmp_path / name) for name in ("a", "same", "other")
  )
  assert a == same != other


def test_reads_are_prefetched(tmp_path, monkeypatch):
  model, params = tiny.write_checkpoint(
    tmp_path / "hf", "phi3", shard=4000, **_EVEN
  )
  asked = set()

  def note(handle, start, size, advice):
    assert advice == os.POSIX_FADV_WILLNEED
    name = pathlib.Path(os.readlink(f"/proc/self/fd/{handle}")).name
    asked.add((name, start, start + size))

  monkeypatch.setattr(os, "posix_fadvise", note)
  _assert_equal(
    load.load(tmp_path / "hf", model, param_dtype="float32"), params
  )
  tensors = shards.open_directory(tmp_path / "hf")
  expected = set()
  for piece in rules.pieces(model):
    tensor = tensors[piece.name]
    row = (tensor.end - tensor.begin) // tensor.shape[0]
    begin, end = (
      tensor.begin + row * rows for rows in (piece.start, piece.stop)
    )
    expected.add((tensor.file.name, begin, end))
  assert asked == expected


def test_prefetching_is_bounded(tmp_path, monkeypatch):
  model, _ = tiny.write_checkpoint(tmp_path / "hf", "qwen2", **_EVEN)
  counts, copy = {"asked": 0, "read": 0}, load._copy

  def ask(*_):
    counts["asked"] += 1
    assert counts["asked"] <= counts["read"] + 3

  def read(*args):
    copy(*args)
    counts["read"] += 1

  monkeypatch.setattr(load, "_NUM_AHEAD", 3)
  monkeypatch.setattr(load, "_STEP_BYTES", 1000)
  monkeypatch.setattr(shards, "read_ahead", ask)
  monkeypatch.setattr(load, "_copy", read)
  load.load(tmp_path / "hf", model, param_dtype="float32")
  assert counts["asked"] == counts["read"] > len(list(rules.pieces(model)))
