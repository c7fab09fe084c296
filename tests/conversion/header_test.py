# SPDX-License-Identifier: Apache-2.0
"""A header with one wrong bit is refused, or says the same."""

import pytest

from atlas_jax import errors
from conversion import load, shards
from tests import tiny


def test_no_flipped_bit_of_a_header_makes_another_model(tmp_path):
  """Of names, shapes, types and places; not of values, which have no digest."""
  model, _ = tiny.write_checkpoint(
    tmp_path / "hf", "qwen2", num_hidden_layers=1
  )
  path = tmp_path / "hf" / shards.SINGLE_NAME
  whole = path.read_bytes()
  expected = load.open_tensors(tmp_path / "hf", model)
  size = 8 + int.from_bytes(whole[:8], "little")
  refused = 0
  for offset in range(0, size, 5):
    flipped = bytearray(whole)
    flipped[offset] ^= 1 << (offset % 8)
    path.write_bytes(flipped)
    try:
      found = load.open_tensors(tmp_path / "hf", model)
    except errors.CheckpointError:
      refused += 1
      continue
    # A space beside a number, or what the file says of its framework.
    assert found == expected, offset
  assert refused > 0.9 * len(range(0, size, 5))


@pytest.mark.parametrize("num_bytes", [0, 7, 8, 100, -1])
def test_a_file_cut_anywhere_is_refused(tmp_path, num_bytes):
  model, _ = tiny.write_checkpoint(tmp_path / "hf", "llama")
  path = tmp_path / "hf" / shards.SINGLE_NAME
  path.write_bytes(path.read_bytes()[:num_bytes])
  with pytest.raises(errors.CheckpointError, match="malformed"):
    load.open_tensors(tmp_path / "hf", model)
