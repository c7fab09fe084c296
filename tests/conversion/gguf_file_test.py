# SPDX-License-Identifier: Apache-2.0
"""GGUF files become Hugging Face directories; damaged ones are rejected."""

import json

import numpy as np
import pytest

from atlas_jax import chat
from conversion import load, weights
from scripts import convert
from tests import tiny

pytest.importorskip(
  "gguf", reason="No package gguf; install requirements/real.txt."
)
from tests import tiny_gguf


@pytest.fixture
def source(tmp_path):
  tiny_gguf.write_source(tmp_path / "source", "llama")
  return tmp_path / "source"


def _run(*words):
  return convert.main([str(word) for word in words])


@pytest.mark.parametrize("family", tiny_gguf.FAMILIES)
def test_a_file_has_the_config_and_tensors_of_its_source(tmp_path, family):
  source, out = tmp_path / "source", tmp_path / "out"
  tiny_gguf.write_source(source, family)
  path = tiny_gguf.write(tmp_path / "model.gguf", source)

  assert _run("from_gguf", path, out) == 0

  assert load.read_config(out)[0] == load.read_config(source)[0]
  expected, got = weights.of_directory(source), weights.of_directory(out)
  assert expected.keys() == got.keys()
  for name, weight in expected.items():
    # Gemma's norm scales are rounded when one is added.
    np.testing.assert_allclose(got[name].read(), weight.read(), atol=1e-6)


@pytest.mark.parametrize(
  ("kind", "dtype"), [("BF16", "bfloat16"), ("F16", "float32")]
)
def test_only_bfloat16_matrices_stay_bfloat16(tmp_path, source, kind, dtype):
  path = tiny_gguf.write(tmp_path / "model.gguf", source, kind=kind)
  assert _run("from_gguf", path, tmp_path / "out") == 0
  held = weights.of_directory(tmp_path / "out").values()
  assert {weight.dtype.name for weight in held} == {dtype}


def test_the_tokenizer_encodes_as_that_of_the_source(tmp_path, source):
  path = tiny_gguf.write(tmp_path / "model.gguf", source)
  assert _run("from_gguf", path, tmp_path / "out") == 0

  before, after = map(chat.load_tokenizer, (source, tmp_path / "out"))
  text = "<|im_start|>What's 12 +  30?\n Na\u00efve, nai\u0308ve<|im_end|>"

  assert after.encode(text) == before.encode(text)
  assert after.chat_template == before.chat_template
  assert after.eos_token == "<|im_end|>"
  assert after.pad_token == "<|endoftext|>"


def test_smollm_splits_digits_before_spaces_are_joined(tmp_path, source):
  path = tiny_gguf.write(tmp_path / "model.gguf", source, pre="smollm")
  assert _run("from_gguf", path, tmp_path / "out") == 0
  tokenizer = chat.load_tokenizer(tmp_path / "out")
  backend = tokenizer.backend_tokenizer
  pieces = backend.pre_tokenizer.pre_tokenize_str("x  12")
  assert [piece for piece, _ in pieces] == ["x", "\u0120\u0120", "1", "2"]


def test_both_end_tokens_stop_generation(tmp_path, source):
  extra = {"tokenizer.ggml.eot_token_id": 1}
  path = tiny_gguf.write(tmp_path / "model.gguf", source, extra=extra)
  assert _run("from_gguf", path, tmp_path / "out") == 0
  text = (tmp_path / "out/generation_config.json").read_text()
  assert json.loads(text)["eos_token_id"] == [1, 2]


def test_an_equal_target_is_done_and_another_is_an_error(
  tmp_path, source, capsys
):
  path = tiny_gguf.write(tmp_path / "model.gguf", source)
  words = ("from_gguf", path, tmp_path / "out")
  assert _run(*words) == 0
  assert _run(*words) == 0
  assert "Already done" in capsys.readouterr().out
  tiny.write_checkpoint(tmp_path / "other", "qwen2")
  assert _run("from_gguf", path, tmp_path / "other") == 2
  assert "The target of the export is in use." in capsys.readouterr().err


def _no_gguf(path):
  path.write_bytes(b"\x08\0\0\0\0\0\0\0{}")


def _cut_in_tensors(path):
  path.write_bytes(path.read_bytes()[:-1000])


def _cut_in_metadata(path):
  path.write_bytes(path.read_bytes()[:200])


def _claims_many_keys(path):
  raw = bytearray(path.read_bytes())
  raw[16:24] = (2**62).to_bytes(8, "little")
  path.write_bytes(raw)


def _empty(path):
  path.write_bytes(b"")


@pytest.mark.parametrize(
  ("harm", "message"),
  [
    (_no_gguf, "The file is not in GGUF format."),
    (_empty, "The file is not in GGUF format."),
    (_cut_in_tensors, "The GGUF file is malformed or incomplete."),
    (_cut_in_metadata, "The GGUF file is malformed or incomplete."),
    (_claims_many_keys, "The GGUF file is malformed or incomplete."),
    (lambda path: path.unlink(), "The file cannot be opened."),
  ],
)
def test_damaged_files_are_rejected(tmp_path, source, capsys, harm, message):
  path = tiny_gguf.write(tmp_path / "model.gguf", source)
  harm(path)
  assert _run("from_gguf", path, tmp_path / "out") == 5
  error = capsys.readouterr().err
  assert message in error
  assert str(path) in error
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"extra": {"llama.attention.clamp_kqv": 3.0}},
      "llama.attention.clamp_kqv=3.0 is unknown",
    ),
    ({"extra": {"llama.expert_count": 8}}, "num_experts=8 is not computed"),
    (
      {"tensors": {"blk.0.attn_rot_embd.weight": np.ones(3)}},
      "blk.0.attn_rot_embd.weight is unexpected",
    ),
    (
      {"tensors": {"output_norm.weight": np.ones(3)}},
      "output_norm.weight is (3,), not (24,)",
    ),
    (
      {"extra": {"tokenizer.ggml.bos_token_id": 10**6}},
      "The vocabulary lacks a special token.",
    ),
    ({"pre": "chameleon"}, "tokenizer.ggml.pre='chameleon' is not one of"),
  ],
)
def test_what_is_not_computed_is_rejected(
  tmp_path, source, capsys, changes, message
):
  path = tiny_gguf.write(tmp_path / "model.gguf", source, **changes)
  assert _run("from_gguf", path, tmp_path / "out") == 5
  assert message in capsys.readouterr().err


def test_an_unknown_architecture_is_rejected(tmp_path, source, capsys):
  path = tiny_gguf.write(tmp_path / "model.gguf", source)
  # In the metadata, the length of a text precedes it.
  raw = path.read_bytes().replace(b"llama", b"mamba")
  path.write_bytes(raw)
  assert _run("from_gguf", path, tmp_path / "out") == 5
  assert "architecture 'mamba' is not one of" in capsys.readouterr().err
