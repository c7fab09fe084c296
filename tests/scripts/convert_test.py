# SPDX-License-Identifier: Apache-2.0
"""The commands of the converter on valid, damaged and malicious input."""

import json
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from atlas_jax import checkpoint, checkpoint_format, sharding
from atlas_jax.models import decoder, lora, quantized
from atlas_jax.train import train_state
from conversion import load, peft_adapters, shards
from scripts import convert
from tests import tiny


def _run(*words):
  return convert.main([str(word) for word in words])


def _train_state(params, *, mesh=None):
  if mesh is None:
    mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
    params = jax.device_put(params, sharding.replicated(mesh))
  return train_state.create(params, optax.adamw(1e-3), mesh=mesh)


@pytest.fixture
def run(tmp_path):
  """Creates a model and a workdir with two steps of its training."""
  _, params = tiny.write_checkpoint(tmp_path / "model", "phi3")
  checkpointer = checkpoint.Checkpointer(
    tmp_path / "run" / "checkpoints",
    identity={},
    keep=2,
    max_failed=1,
    allow_changed="",
    best_metric="",
    best_mode="min",
    load_best=False,
  )
  doubled = jax.tree.map(lambda leaf: 2 * leaf, params)
  with checkpointer:
    checkpointer.save(9, _train_state(doubled), {}, {})
    checkpointer.save(10, _train_state(params), {}, {})
  return tmp_path


def test_inspect_lists_a_directory_as_a_tree(tmp_path, capsys):
  tiny.write_checkpoint(tmp_path / "hf", "qwen2", dtype="bfloat16")
  assert _run("inspect", tmp_path / "hf") == 0
  out = capsys.readouterr().out
  assert "qwen2: layers 2, width 21, heads 3 over 1 of 8, MLP 28" in out
  assert "1,554    weight  bfloat16 (37, 21)\n" in out
  assert out.endswith("bytes in 27 tensors\n")


def test_inspect_lists_an_unsupported_model(tmp_path, capsys):
  directory, _ = _with_fields(
    tmp_path, final_logit_softcapping=30.0, mlp_bias=True, use_mrope=False
  )
  assert _run("inspect", directory) == 0
  out = capsys.readouterr().out
  assert "Unsupported model: final_logit_softcapping=30.0" in out
  assert "mlp_bias must be False, got True" in out
  assert out.endswith("bytes in 27 tensors\n")
  (directory / "config.json").write_text("{")
  assert _run("inspect", directory) == 0


def test_inspect_lists_fields_that_are_not_read(tmp_path, capsys):
  directory, _ = _with_fields(tmp_path, use_mrope=False, unsloth_version="1")
  assert _run("inspect", directory) == 0
  out = capsys.readouterr().out
  assert "qwen2: layers 2" in out
  assert "does not read: unsloth_version, use_mrope\n" in out


def test_ignored_fields_are_converted_and_kept(tmp_path, capsys):
  directory, fields = _with_fields(tmp_path, final_logit_softcapping=30.0)
  (directory / "tokenizer.json").write_text("{}")
  words = ("from_hf", directory, tmp_path / "orbax")
  assert _run(*words) == 5
  ignore = "--ignore_fields=final_logit_softcapping"
  assert _run(*words, ignore) == 0
  words = ("to_hf", tmp_path / "orbax", tmp_path / "hf2")
  assert _run(*words, f"--source={directory}") == 5
  assert _run(*words, f"--source={directory}", ignore) == 0
  assert json.loads((tmp_path / "hf2/config.json").read_text()) == fields
  capsys.readouterr()
  assert _run("verify", directory, tmp_path / "hf2", ignore) == 0


def _with_fields(tmp_path, **changes):
  """Writes a checkpoint with more fields; returns directory and fields."""
  directory = tmp_path / "hf"
  tiny.write_checkpoint(directory, "qwen2")
  path = directory / "config.json"
  fields = json.loads(path.read_text()) | changes
  path.write_text(json.dumps(fields))
  return directory, fields


def test_inspect_lists_a_checkpoint_with_its_sharding(
  tmp_path, capsys, monkeypatch
):
  model = tiny.build(
    "qwen2",
    vocab_size=38,
    hidden_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
  )
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  places = sharding.of_params(mesh, model.abstract_params)
  params = jax.device_put(tiny.params_of(model), places)
  checkpoint_format.write(
    tmp_path / "7", _train_state(params, mesh=mesh), identity={}
  )
  monkeypatch.chdir(tmp_path)
  assert _run("inspect", ".") == 0
  out = capsys.readouterr().out
  assert "Orbax checkpoint 7\n" in out
  assert "embedding  float32 (38, 24)  split (tensor=2, fsdp=2)\n" in out
  assert "bias  float32 (2, 2, 8)  split (whole, tensor=2, whole)\n" in out
  assert "step  int32 ()\n" in out
  assert "opt_state" in out


def test_run_round_trips_through_hugging_face_format(run, capsys):
  source = f"--source={run / 'model'}"
  to_hf = ("to_hf", run / "run", run / "hf", source)
  assert _run(*to_hf, "--dry_run") == 0
  assert sorted(os.listdir(run)) == ["model", "model-source", "run"]
  assert _run(*to_hf) == 0
  assert tiny.differing(run / "model", run / "hf") == []
  out = capsys.readouterr().out
  assert "Logits differ by at most 0.0e+00" in out
  assert "\nCopied: chat_template.jinja, " in out

  assert _run("from_hf", run / "hf", run / "orbax", "--dry_run") == 0
  assert not (run / "orbax").exists()
  for _ in range(2):
    assert _run("from_hf", run / "hf", run / "orbax") == 0
  assert _run(*to_hf) == 0
  assert capsys.readouterr().out.count("Already done") == 2
  # The target holds another model than step 9.
  step = ("to_hf", run / "run/checkpoints/9", run / "hf", source)
  assert _run(*step) == 2
  for a, b in (("run", "hf"), ("hf", "orbax"), ("run", "orbax")):
    assert _run("verify", run / a, run / b) == 0
  assert _run(*step, "--overwrite") == 0
  assert _run("verify", run / "run", run / "hf", "--nologits") == 5
  assert sorted(os.listdir(run)) == [
    "hf",
    "model",
    "model-source",
    "orbax",
    "run",
  ]


def test_dtype_flag_sets_the_written_dtype(run):
  assert _run("from_hf", run / "model", run / "o", "--dtype=bfloat16") == 0
  source = f"--source={run / 'model'}"
  assert _run("to_hf", run / "o", run / "hf", source) == 0
  tensors = shards.open_directory(run / "hf")
  assert {t.dtype.name for t in tensors.values()} == {"bfloat16"}


_LORA = lora.Lora(rank=2, alpha=3.0, targets=("attention/q", "mlp/up"))


def _write_adapters(directory, family):
  """Writes a base and a checkpoint of adapters over it in bfloat16."""
  model, params = tiny.write_checkpoint(
    directory / "base", family, dtype="bfloat16"
  )
  held = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
  base = lora.fingerprint(lora.checksums(held))
  adapters = jax.tree.map(
    lambda leaf: jnp.full(leaf.shape, 0.1),
    lora.only(lora.adapt(model, _LORA).abstract_params),
  )
  identity = {"base": base, "lora.alpha": "3.0"}
  state = _train_state(adapters)
  checkpoint_format.write(directory / "7", state, identity=identity)
  return model, held, adapters


@pytest.mark.parametrize("family", ["qwen3", "phi3"])
def test_adapters_are_merged(tmp_path, family):
  _, held, adapters = _write_adapters(tmp_path, family)
  source = f"--source={tmp_path / 'base'}"
  assert _run("to_hf", tmp_path, tmp_path / "hf", source) == 0
  built, _ = load.read_config(tmp_path / "hf")
  model = decoder.build(
    built, dtype="float32", attention="xla", remat="none", unroll=1
  )
  got = load.load(tmp_path / "hf", model, param_dtype="bfloat16")
  merged = lora.merge(held, adapters, _LORA.scale)
  jax.tree.map(np.testing.assert_array_equal, got, merged)


def test_adapters_are_written_in_peft_format(tmp_path, capsys):
  model, _, adapters = _write_adapters(tmp_path, "qwen3")
  source = f"--source={tmp_path / 'base'}"
  out = tmp_path / "adapter"
  assert _run("to_hf", tmp_path, out, source, "--nomerge") == 0
  found = peft_adapters.load(out, model, _LORA)
  jax.tree.map(np.testing.assert_array_equal, found, adapters)
  assert _run("to_hf", tmp_path, out, source, "--nomerge") == 2
  capsys.readouterr()

  _write_adapters(tmp_path / "phi", "phi3")
  source = f"--source={tmp_path / 'phi/base'}"
  assert _run("to_hf", tmp_path / "phi", out / "x", source, "--nomerge") == 2
  assert "PEFT cannot represent adapters of phi3" in capsys.readouterr().err


@pytest.mark.parametrize("kind", quantized.KINDS)
def test_adapters_are_merged_into_their_quantized_base(tmp_path, kind, capsys):
  model, _ = tiny.write_checkpoint(
    tmp_path / "base", "qwen3", dtype="bfloat16", **tiny.blocks("qwen3")
  )
  held = load.load(tmp_path / "base", model, param_dtype=kind)
  adapters = jax.tree.map(
    lambda leaf: jnp.full(leaf.shape, 0.1),
    lora.only(lora.adapt(model, _LORA).abstract_params),
  )
  identity = {
    "base": lora.fingerprint(lora.checksums(held)),
    "base.kept_as": kind,
    "lora.alpha": "3.0",
  }
  checkpoint_format.write(
    tmp_path / "7", _train_state(adapters), identity=identity
  )
  source = f"--source={tmp_path / 'base'}"
  assert _run("to_hf", tmp_path, tmp_path / "hf", source) == 0

  got = load.load(tmp_path / "hf", model, param_dtype="bfloat16")
  whole = quantized.whole(held, np.dtype(np.float32))
  merged = lora.merge(whole, adapters, _LORA.scale)
  jax.tree.map(
    np.testing.assert_array_equal,
    got,
    jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), merged),
  )
  card = (tmp_path / "hf/README.md").read_text()
  assert f"Base quantized to: {kind}" in card
  assert "not the original base" in card
  # Unmerged adapters equal the trained ones.
  assert _run("to_hf", tmp_path, tmp_path / "a", source, "--nomerge") == 0
  found = peft_adapters.load(tmp_path / "a", model, _LORA)
  jax.tree.map(np.testing.assert_array_equal, found, adapters)
  assert "over the quantized base" in (tmp_path / "a/README.md").read_text()

  tiny.write_checkpoint(
    tmp_path / "b", "qwen3", dtype="bfloat16", seed=1, **tiny.blocks("qwen3")
  )
  source = f"--source={tmp_path / 'b'}"
  assert _run("to_hf", tmp_path, tmp_path / "x", source) == 5
  assert "trained over a different base" in capsys.readouterr().err


def test_adapters_over_another_base_are_rejected(tmp_path, capsys):
  _write_adapters(tmp_path, "qwen3")
  path = tmp_path / "base/model.safetensors"
  raw = bytearray(path.read_bytes())
  raw[-1] ^= 0x80  # The sign of the last value.
  path.write_bytes(raw)
  source = f"--source={tmp_path / 'base'}"
  assert _run("to_hf", tmp_path, tmp_path / "hf", source) == 5
  assert "trained over a different base" in capsys.readouterr().err


def test_a_run_is_compared_with_its_export_at_the_export_precision(run, capsys):
  export, source = run / "run/export", f"--source={run / 'model'}"
  words = ("to_hf", run / "run", export, source, "--dtype=bfloat16")
  assert _run(*words, "--overwrite") == 0
  for pair in ((run / "run", export), (export, run / "run")):
    assert _run("verify", *pair) == 0
    assert "equal, bit for bit (bfloat16).\n" in capsys.readouterr().out
  # Two directories of different precisions are different.
  assert _run("verify", run / "model", export, "--nologits") == 5
  assert "float32 against bfloat16\n" in capsys.readouterr().out
  # Another step differs in more than its precision.
  assert _run("verify", run / "run/checkpoints/9", export, "--nologits") == 5
  assert "float32 against bfloat16\n" not in capsys.readouterr().out


def test_verify_names_the_first_differing_layer(run, capsys):
  _, params = tiny.write_checkpoint(run / "a", "gemma2")
  kernel = params["layers"]["mlp"]["up"]["kernel"]
  params["layers"]["mlp"]["up"]["kernel"] = kernel.at[1, 0, 0].add(0.25)
  state = {"params": params}
  checkpoint_format.write(run / "b", state, identity={})
  capsys.readouterr()
  assert _run("verify", run / "a", run / "b") == 5
  out, err = capsys.readouterr()
  assert "       1              1       0.25  layer 1: values\n" in out
  assert "Hidden states differ first after layer 1.\n" in out
  assert re.search(r" 0 +0  layer 0\n +0\.\d+ +[1-9][\d.e-]+  layer 1\n", out)
  assert re.search(
    r"at most \S+, with a KL divergence of [1-9][\d.e-]+ nats", out
  )
  assert "1 tensors or settings differ" in err


def test_equal_tensors_under_another_config_differ(tmp_path, capsys):
  for name, epsilon in (("a", 1e-6), ("b", 1e-5)):
    tiny.write_checkpoint(tmp_path / name, "llama", rms_norm_eps=epsilon)
  assert _run("verify", tmp_path / "a", tmp_path / "b", "--nologits") == 5
  assert "norm_epsilon: 1e-06 and 1e-05\n" in capsys.readouterr().out


def test_damaged_checkpoint_is_not_converted(run, capsys):
  data = run / "run/checkpoints/10/state/d"
  path = next(path for path in data.iterdir())
  raw = bytearray(path.read_bytes())
  raw[len(raw) // 2] ^= 1
  path.write_bytes(raw)
  source = f"--source={run / 'model'}"
  assert _run("to_hf", run / "run", run / "hf", source) == 5
  assert f"state/d/{path.name} has SHA-256" in capsys.readouterr().err
  assert not (run / "hf").exists()


def _pickled(directory: pathlib.Path) -> None:
  weights = directory / "model.safetensors"
  weights.rename(directory / "pytorch_model.bin")


def _truncated(directory: pathlib.Path) -> None:
  path = directory / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-1])


def _header_bomb(directory: pathlib.Path) -> None:
  (directory / "model.safetensors").write_bytes(b"\xff" * 8 + b"{}")


def _outside(directory: pathlib.Path) -> None:
  index = {"weight_map": {"x": "../secret.safetensors"}}
  (directory / shards.INDEX_NAME).write_text(json.dumps(index))


def _one_missing(directory: pathlib.Path) -> None:
  weights = directory / "model.safetensors"
  weights.rename(directory / "model-00001-of-00002.safetensors")
  files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
  index = {"weight_map": {file: file for file in files}}
  (directory / shards.INDEX_NAME).write_text(json.dumps(index))


def _replace(directory: pathlib.Path, old: bytes, new: bytes) -> None:
  """Changes the header but not its length."""
  path = directory / "model.safetensors"
  raw = path.read_bytes()
  assert old in raw
  path.write_bytes(raw.replace(old, new, 1))


def _other_type(directory: pathlib.Path) -> None:
  _replace(directory, b'"F32"', b'"I32"')


def _renamed(directory: pathlib.Path) -> None:
  _replace(directory, b"model.norm.weight", b"model.norm.heavy_")


def _flipped(directory: pathlib.Path) -> None:
  path = directory / "model.safetensors"
  raw = bytearray(path.read_bytes())
  raw[-2:] = b"\xc0\x7f"  # A NaN, which one flipped exponent bit can cause.
  path.write_bytes(raw)


@pytest.mark.parametrize(
  ("harm", "message"),
  [
    (_pickled, "save_pretrained(o)"),
    (_one_missing, "Missing: ['model-00002-of-00002.safetensors']"),
    (_other_type, "has dtype 'I32'; supported are"),
    (_renamed, "Missing: model.norm.weight. Unexpected: model.norm.heavy_"),
    (_truncated, "its tensors end at byte"),
    (_header_bomb, "its header claims"),
    (_outside, "points outside of the directory"),
    (_flipped, "Weights are not finite"),
  ],
)
def test_bad_input_is_exit_code_5(tmp_path, capsys, harm, message):
  tiny.write_checkpoint(tmp_path / "hf", "llama")
  harm(tmp_path / "hf")
  assert _run("from_hf", tmp_path / "hf", tmp_path / "out") == 5
  assert message in capsys.readouterr().err
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  "words",
  [[], ["verify", "a"], ["to_hf", "a"], ["inspect", "a", "--unknown"]],
)
def test_invalid_commands_are_exit_code_2(words, capsys):
  assert _run(*words) == 2
  assert "python -m scripts.convert --help" in capsys.readouterr().err


def test_missing_input_is_exit_code_5(tmp_path):
  assert _run("inspect", tmp_path / "absent") == 5
  source = f"--source={tmp_path}"
  assert _run("to_hf", tmp_path / "absent", tmp_path / "out", source) == 5
