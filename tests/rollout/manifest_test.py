# SPDX-License-Identifier: Apache-2.0
"""A pushed directory is accepted complete and unaltered, or not at all."""

import json
import os

import numpy as np
import pytest

from atlas_jax import errors
from conversion import arrays, shards
from rollout import manifest
from tests import fakes

_SHAPES = {"a.weight": (3, 4), "b.weight": (5,)}


def _push(root, version=1, *, dtype="float32", shapes=_SHAPES, fill=1.0):
  directory = manifest.directory_of(root, version)
  directory.mkdir(parents=True)
  shards.write(
    directory,
    shapes,
    lambda name: np.full(shapes[name], fill, np.float32),
    dtype=dtype,
    max_shard_bytes=50,
  )
  shards.write_json(directory / "config.json", {})
  return _seal(directory, version, shapes=shapes, dtype=dtype)


def _seal(directory, version, *, shapes=_SHAPES, dtype="float32"):
  (directory / manifest.NAME).unlink(missing_ok=True)
  kind = "F32" if dtype == "float32" else "BF16"
  listed = manifest.Manifest(
    version=version,
    files={p.name: manifest.describe(p) for p in directory.iterdir()},
    tensors={
      name: manifest.Tensor(shape=shape, dtype=kind)
      for name, shape in shapes.items()
    },
  )
  return directory, manifest.write(directory, listed)


def _verify(root, digest, *, version=1, shapes=_SHAPES):
  return manifest.verify(root, version=version, digest=digest, shapes=shapes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_complete_directory_is_accepted(tmp_path, dtype):
  directory, digest = _push(tmp_path, dtype=dtype)
  assert _verify(tmp_path, digest) == directory
  assert manifest.read(directory)[0].version == 1


@pytest.mark.parametrize("at", [-1, 20])
def test_one_altered_byte_is_rejected(tmp_path, at):
  directory, digest = _push(tmp_path)
  path = next(directory.glob("*.safetensors"))
  raw = bytearray(path.read_bytes())
  raw[at] ^= 1
  path.write_bytes(raw)
  with pytest.raises(errors.CheckpointError, match="digest differs"):
    _verify(tmp_path, digest)


def _of_another_push(raw, other):
  del raw
  return other


_DAMAGE = {
  "one bit of the last chunk": lambda raw, _: raw[:-1] + bytes([raw[-1] ^ 16]),
  "a page that was never written": lambda raw, _: (
    raw[: 2**20] + bytes(4096) + raw[2**20 + 4096 :]
  ),
  "two pages in each other's place": lambda raw, _: (
    raw[:4096] + raw[8192:12288] + raw[4096:8192] + raw[12288:]
  ),
  "a file of an older push": _of_another_push,
}


@pytest.mark.parametrize("damage", _DAMAGE.values(), ids=_DAMAGE)
def test_damage_that_keeps_the_size_is_rejected(tmp_path, damage):
  shapes = {"a.weight": (3 * 2**18 + 5,)}
  draw = np.random.default_rng(0).standard_normal
  older, newer = (draw(shapes["a.weight"], np.float32) for _ in range(2))
  files = []
  for version, values in enumerate((older, newer)):
    directory, digest = _push(tmp_path, version, shapes=shapes, fill=values)
    files.append(directory / shards.SINGLE_NAME)
  _verify(tmp_path, digest, shapes=shapes)
  damaged = damage(files[1].read_bytes(), files[0].read_bytes())
  assert len(damaged) == files[1].stat().st_size
  files[1].write_bytes(damaged)
  with pytest.raises(errors.CheckpointError, match="digest differs"):
    _verify(tmp_path, digest, shapes=shapes)


def test_incomplete_directory_is_rejected(tmp_path):
  directory, digest = _push(tmp_path)
  (directory / manifest.NAME).unlink()
  with pytest.raises(errors.CheckpointError, match="cannot be read"):
    _verify(tmp_path, digest)


def test_missing_extra_and_short_files_are_rejected(tmp_path):
  for version, spoil in enumerate(
    [
      lambda d: (d / "config.json").unlink(),
      lambda d: (d / "model-extra.safetensors").write_bytes(b""),
      lambda d: (d / "config.json").write_text(""),
    ]
  ):
    directory, digest = _push(tmp_path, version)
    spoil(directory)
    with pytest.raises(errors.CheckpointError, match=r"differ from|bytes, not"):
      _verify(tmp_path, digest, version=version)


def test_links_are_rejected(tmp_path):
  directory, digest = _push(tmp_path)
  outside = tmp_path / "outside.json"
  (directory / "config.json").rename(outside)
  (directory / "config.json").symlink_to(outside)
  with pytest.raises(errors.CheckpointError, match="regular file"):
    _verify(tmp_path, digest)
  os.symlink(directory, tmp_path / "2")
  with pytest.raises(errors.CheckpointError, match="is a link"):
    _verify(tmp_path, digest, version=2)


def test_other_manifest_and_version_are_rejected(tmp_path):
  directory, digest = _push(tmp_path)
  with pytest.raises(errors.CheckpointError, match="its digest is"):
    _verify(tmp_path, "0" * 64)
  directory.rename(tmp_path / "7")
  with pytest.raises(errors.CheckpointError, match="version is 1"):
    _verify(tmp_path, digest, version=7)


def test_manifest_with_wrong_tensors_is_rejected(tmp_path):
  transposed = {**_SHAPES, "a.weight": (4, 3)}
  directory, _ = _push(tmp_path)
  _, digest = _seal(directory, 1, shapes=transposed)
  with pytest.raises(errors.CheckpointError, match=r"differ from.*a\.weight"):
    _verify(tmp_path, digest, shapes=transposed)


def test_tensors_of_another_model_are_rejected_in_a_table(tmp_path):
  _, digest = _push(tmp_path)
  other = {"a.weight": (3, 5), "c.weight": (5,)}
  with pytest.raises(errors.CheckpointError) as caught:
    _verify(tmp_path, digest, shapes=other)
  assert "a.weight: got [3, 4], expected [3, 5]" in caught.value.why
  assert "b.weight: got [5], expected none" in caught.value.why
  assert "c.weight: got none, expected [5]" in caught.value.why


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_rejected(tmp_path, dtype, value, monkeypatch):
  monkeypatch.setattr(arrays, "check_finite", lambda *_: None)
  _, digest = _push(tmp_path, dtype=dtype, fill=value)
  monkeypatch.undo()
  with pytest.raises(errors.CheckpointError, match="not finite"):
    _verify(tmp_path, digest)


def test_largest_finite_values_are_accepted(tmp_path):
  largest = float(np.finfo(np.float32).max)
  _, digest = _push(tmp_path, fill=largest)
  _verify(tmp_path, digest)


def test_tokenizer_digest_depends_only_on_content(tmp_path):
  fakes.write_tokenizer(tmp_path)
  before = manifest.tokenizer_digest(tmp_path)
  path = tmp_path / "tokenizer.json"
  fields = json.loads(path.read_text())
  path.write_text(json.dumps({**fields, "padding": {"length": 3}}, indent=7))
  assert manifest.tokenizer_digest(tmp_path) == before
  fields["added_tokens"][0]["content"] = "<|new|>"
  path.write_text(json.dumps(fields))
  changed = manifest.tokenizer_digest(tmp_path)
  (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
  assert len({before, changed, manifest.tokenizer_digest(tmp_path)}) == 3


def test_directory_without_tokenizer_is_rejected(tmp_path):
  with pytest.raises(errors.CheckpointError, match="no tokenizer"):
    manifest.tokenizer_digest(tmp_path)
