# SPDX-License-Identifier: Apache-2.0
"""A header with one flipped bit is rejected, or describes the same tensors."""

import pytest

from atlas_jax import errors
from conversion import load, shards
from tests import tiny


def test_flipped_header_bits_are_detected(tmp_path):
  """Covers names, shapes, dtypes and offsets, but not the tensors' values."""
  model, _ = tiny.write_checkpoint(
    tmp_path / "hf", "qwen2", num_hidden_layers=1
  )
  path = tmp_path / "hf" / shards.SINGLE_NAME
  whole = path.read_bytes()
  expected = load.open_tensors(tmp_path / "hf", model)
  size = 8 + int.from_bytes(whole[:8], "little")
  rejected = 0
  for offset in range(0, size, 5):
    flipped = bytearray(whole)
    flipped[offset] ^= 1 << (offset % 8)
    path.write_bytes(flipped)
    try:
      found = load.open_tensors(tmp_path / "hf", model)
    except errors.CheckpointError:
      rejected += 1
      continue
    # Only whitespace or the framework in the metadata changed.
    assert found == expected, offset
  assert rejected > 0.9 * len(range(0, size, 5))


@pytest.mark.parametrize("num_bytes", [0, 7, 8, 100, -1])
def test_truncated_files_are_rejected(tmp_path, num_bytes):
  model, _ = tiny.write_checkpoint(tmp_path / "hf", "llama")
  path = tmp_path / "hf" / shards.SINGLE_NAME
  path.write_bytes(path.read_bytes()[:num_bytes])
  with pytest.raises(errors.CheckpointError, match="malformed"):
    load.open_tensors(tmp_path / "hf", model)
