# SPDX-License-Identifier: Apache-2.0
"""PEFT directories: round trip, merging, and rejection of mismatches."""

import json

import jax
import numpy as np
import pytest

from atlas_jax import errors
from atlas_jax.models import lora
from conversion import card, load, peft_adapters, shards
from scripts import convert
from tests import tiny

_LORA = lora.Lora(rank=3, alpha=7.0, targets=("attention/[qk]", "mlp/down"))


@pytest.fixture
def job(tmp_path):
  """Returns a model, its parameters and adapters, all saved to disk."""
  model, params = tiny.write_checkpoint(tmp_path / "base", "qwen3")
  abstract = lora.only(lora.adapt(model, _LORA).abstract_params)
  adapters = jax.tree.map(
    lambda leaf: 0.2 * jax.random.normal(jax.random.key(5), leaf.shape),
    abstract,
  )
  peft_adapters.save_directory(
    tmp_path / "adapter",
    adapters,
    model,
    settings=_LORA,
    source=tmp_path / "base",
    about=card.Card(base="base"),
  )
  return model, params, adapters


def _merge(directory, *words):
  names = ("base", "adapter", "output")
  flags = [f"--{name}={directory / name}" for name in names]
  return convert.main(["merge", *flags, *words])


def test_written_adapters_are_read_back_bit_for_bit(tmp_path, job):
  model, _, adapters = job
  found = peft_adapters.load(tmp_path / "adapter", model, _LORA)
  jax.tree.map(np.testing.assert_array_equal, found, adapters)


def test_merged_directory_has_the_merged_parameters(tmp_path, job):
  model, params, adapters = job
  assert _merge(tmp_path, "--dry_run") == 0
  assert not (tmp_path / "output").exists()
  assert _merge(tmp_path, "--max_shard_bytes=4000") == 0
  assert (tmp_path / "output" / shards.INDEX_NAME).exists()
  got = load.load(tmp_path / "output", model, param_dtype="float32")
  wanted = lora.merge(params, adapters, _LORA.scale)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    got,
    wanted,
  )


def test_repeated_merge_is_skipped_and_other_targets_are_kept(
  tmp_path, job, capsys
):
  del job
  assert _merge(tmp_path) == 0
  assert _merge(tmp_path) == 0
  assert "Already done" in capsys.readouterr().out
  assert _merge(tmp_path, "--dtype=bfloat16") == 2
  assert _merge(tmp_path, "--dtype=bfloat16", "--overwrite") == 0


@pytest.mark.parametrize(
  ("rank", "alpha", "targets", "message"),
  [
    (2, 7.0, _LORA.targets, "--config.lora.rank=3"),
    (3, 8.0, _LORA.targets, "--config.lora.alpha=7.0"),
    (0, 7.0, _LORA.targets, "--config.lora.rank=3"),
    (3, 7.0, ("attention/[qk]",), "mlp.down_proj.weight"),
    (3, 7.0, (*_LORA.targets, "mlp/up"), "mlp.up_proj.weight"),
  ],
)
def test_adapters_that_do_not_match_the_config_are_rejected(
  tmp_path, job, rank, alpha, targets, message
):
  settings = lora.Lora(rank=rank, alpha=alpha, targets=targets)
  with pytest.raises(errors.ConfigError, match=message):
    peft_adapters.load(tmp_path / "adapter", job[0], settings)


def _change(tmp_path, **changes):
  path = tmp_path / "adapter/adapter_config.json"
  fields = {**json.loads(path.read_text()), **changes}
  path.write_text(json.dumps(fields))


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("peft_type", "LOHA"),
    ("use_dora", True),
    ("lora_bias", True),
    ("modules_to_save", ["lm_head"]),
    ("target_parameters", ["experts.down_proj"]),
    ("a_field_of_next_year", 1),
    ("r", 0),
    ("r", "3"),
    ("lora_alpha", None),
  ],
)
def test_unsupported_field_is_named(tmp_path, job, capsys, field, value):
  del job
  _change(tmp_path, **{field: value})
  assert _merge(tmp_path) == 5
  assert f"{field}={value!r}" in capsys.readouterr().err


def test_adapter_of_another_model_or_shape_is_rejected(tmp_path, job, capsys):
  model = job[0]
  tiny.write_checkpoint(tmp_path / "other", "qwen3", intermediate_size=30)
  flags = [f"--{name}={tmp_path / name}" for name in ("adapter", "output")]
  assert convert.main(["merge", f"--base={tmp_path / 'other'}", *flags]) == 5
  assert "mlp.down_proj.weight is (21, 30), not (21, 28)" in (
    capsys.readouterr().err
  )
  _change(tmp_path, r=2)
  with pytest.raises(errors.CheckpointError, match="Rank is 2"):
    peft_adapters.load(tmp_path / "adapter", model, _LORA)


def test_pickled_adapters_are_rejected(tmp_path, job):
  path = tmp_path / "adapter/adapter_model.safetensors"
  path.rename(path.with_suffix(".bin"))
  with pytest.raises(errors.CheckpointError, match="pickled files are not"):
    peft_adapters.load(tmp_path / "adapter", job[0], _LORA)
