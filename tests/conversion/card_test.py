# SPDX-License-Identifier: Apache-2.0
"""A model card names the origin of the weights, and the Hub can parse it."""

import huggingface_hub
import pytest
import xxhash

from conversion import card, save
from tests import tiny


@pytest.fixture
def source(tmp_path):
  """Returns a base model in the layout of the Hub's cache."""
  return tiny.write_source(tmp_path / "snapshots" / "c0ffee", "qwen2")


def _write(directory, source, about):
  model = tiny.build("qwen2")
  save.save(
    directory,
    tiny.params_of(model),
    model,
    source=source,
    dtype="float32",
    max_shard_bytes=10**9,
    about=about,
    overwrite=False,
  )
  return huggingface_hub.ModelCard.load(directory / "README.md")


def test_card_copies_base_revision_and_license(tmp_path, source):
  (source / "README.md").write_text(
    "---\nlicense: other\nlicense_name: own\nbase_model: a/older\n"
    "datasets: [theirs]\n---\n# Theirs\n"
  )
  about = card.Card(
    base="an/id",
    facts={"Recipe": "SFT", "Reward": "a | b <script>\n# x"},
    metrics={"eval/loss": (8, 0.25)},
  )
  read = _write(tmp_path / "out", source, about)

  assert read.data.to_dict() == {
    "base_model": "an/id",
    "library_name": "transformers",
    "license": "other",
    "license_name": "own",
    "pipeline_tag": "text-generation",
    "tags": ["atlas_jax"],
  }
  weights = (tmp_path / "out/model.safetensors").read_bytes()
  digest = xxhash.xxh3_128(weights).hexdigest()
  assert "Warning" not in read.text
  for line in (
    "- Base model: an/id",
    "- Base revision: c0ffee",
    "- Recipe: SFT",
    "- Reward: a \\| b &lt;script> # x",
    "| eval/loss | 8 | 0.25 |",
    f"| model.safetensors | {digest} |",
  ):
    assert f"\n{line}\n" in read.text
  assert "- Written by: atlas_jax " in read.text
  assert "not installed" not in read.text


def test_local_path_is_not_a_base_id_and_missing_license_is_noted(tmp_path):
  source = tiny.write_source(tmp_path / "local", "qwen2")
  about = card.Card(base="results/sft", warning="untrained.")
  read = _write(tmp_path / "out", source, about)
  assert "\n# Model card\n\n> **Warning:** untrained.\n\n- " in read.text
  assert read.data.base_model is None
  assert read.data.license is None
  assert "- License: that of the base model" in read.text
  # A model trained from this export reads the id from its card.
  (source / "README.md").write_text("---\nbase_model: an/id\n---\n")
  read = _write(tmp_path / "next", source, card.Card(base="results/sft"))
  assert read.data.base_model == "an/id"


@pytest.mark.parametrize(
  "text", ["---\n[a\n---\n", "---\n- a\n---\n", "no head", "\xff"]
)
def test_unreadable_base_card_is_ignored(tmp_path, source, text):
  (source / "README.md").write_text(text, encoding="latin-1")
  assert (
    "license"
    not in _write(tmp_path / "o", source, card.Card(base="b")).data.to_dict()
  )
