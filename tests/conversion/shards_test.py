# SPDX-License-Identifier: Apache-2.0
"""Valid and malicious files of tensors."""

import itertools
import json
import os
import pathlib
import tempfile

import hypothesis
from hypothesis import strategies
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from atlas_jax import errors
from conversion import arrays, header, shards


def _write(directory, tensors, *, dtype="float32", shard=10**9):
  directory.mkdir(exist_ok=True)
  shapes = {name: array.shape for name, array in tensors.items()}
  shards.write(
    directory, shapes, tensors.get, dtype=dtype, max_shard_bytes=shard
  )
  return directory


def _raw(directory, header, body=b"", length=None):
  """Writes a file with an arbitrary header."""
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  size = len(text) if length is None else length
  path = directory / shards.SINGLE_NAME
  path.write_bytes(size.to_bytes(8, "little") + text + body)
  return directory


def _entry(dtype="F32", shape=(2,), offsets=(0, 8)):
  return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


_ARRAY = np.arange(24, dtype=np.float32).reshape(4, 6)
_VIEWS = {
  "transpose": _ARRAY.T,
  "slice": _ARRAY[:, 1:4],
  "fortran": np.asfortranarray(_ARRAY),
  "broadcast": np.broadcast_to(_ARRAY[0], (3, 6)),
  "reversed": _ARRAY[::-1, ::-1],
  "empty": _ARRAY[:0],
}


def test_views_are_written_in_logical_order(tmp_path):
  _write(tmp_path, _VIEWS)
  public = safetensors.numpy.load_file(tmp_path / shards.SINGLE_NAME)
  for name, tensor in shards.open_directory(tmp_path).items():
    np.testing.assert_array_equal(shards.read(tensor), _VIEWS[name])
    np.testing.assert_array_equal(public[name], _VIEWS[name])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(70, 50), (1, 40), (40, 1), (33, 32)])
def test_transposed_matrices_are_cast_and_written(tmp_path, dtype, shape):
  matrix = np.random.default_rng(0).normal(size=shape).astype(np.float32).T
  (tensor,) = shards.open_directory(
    _write(tmp_path, {"a": matrix}, dtype=dtype)
  ).values()
  np.testing.assert_array_equal(shards.read(tensor), matrix.astype(dtype))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_single_non_finite_value_is_found_anywhere(dtype, bad):
  array = np.full(2**18 + 7, -3e4).astype(dtype)
  arrays.check_finite("a", array)
  for place in (0, 2**18 - 1, 2**18, len(array) - 1):
    broken = array.copy()
    broken[place] = bad
    with pytest.raises(errors.CheckpointError, match="1 of its"):
      arrays.check_finite("a", broken)


def test_digests_do_not_depend_on_memory_order():
  for view in _VIEWS.values():
    assert shards.digest(view) == shards.digest(np.array(view, order="C"))
  assert shards.digest(_ARRAY) != shards.digest(_ARRAY[::-1])


def test_read_maps_the_file(tmp_path):
  _write(tmp_path, {"a": _ARRAY})
  array = shards.read(shards.open_directory(tmp_path)["a"])
  assert not array.flags.writeable
  assert not array.flags.owndata


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_each_dtype_round_trips(tmp_path, dtype):
  array = np.random.default_rng(0).normal(size=(3, 5)).astype(dtype)
  (tensor,) = shards.open_directory(
    _write(tmp_path, {"a": array}, dtype=dtype)
  ).values()
  assert tensor.dtype == array.dtype
  assert shards.digest(shards.read(tensor)) == shards.digest(array)


def test_files_respect_the_limit_and_the_index_is_complete(tmp_path):
  tensors = {name: np.full(10, i, np.float32) for i, name in enumerate("abcd")}
  tensors["big"] = np.zeros(50, np.float32)
  _write(tmp_path, tensors, shard=80)

  index = json.loads((tmp_path / shards.INDEX_NAME).read_text())
  files = [index["weight_map"][name] for name in tensors]

  assert files == [
    f"model-0000{i}-of-00003.safetensors" for i in (1, 1, 2, 2, 3)
  ]
  assert index["metadata"]["total_size"] == 4 * 90
  assert shards.open_directory(tmp_path).keys() == tensors.keys()


def test_non_finite_value_is_rejected_by_name(tmp_path):
  for bad in (np.nan, np.inf):
    with pytest.raises(errors.CheckpointError) as caught:
      _write(tmp_path, {"a": np.zeros(3), "b.c": np.array([1.0, bad])})
    assert caught.value.where == "b.c"


def test_overflow_of_the_written_dtype_is_rejected(tmp_path):
  with pytest.raises(errors.CheckpointError, match="not finite"):
    _write(tmp_path, {"a": np.array([1e30])}, dtype="float16")


def test_tensor_of_another_shape_is_rejected(tmp_path):
  with pytest.raises(ValueError, match="a has shape"):
    shards.write(
      tmp_path,
      {"a": (3,)},
      lambda _: np.zeros(2),
      dtype="float32",
      max_shard_bytes=100,
    )


def test_corruption_during_a_write_is_detected(tmp_path, monkeypatch):
  def flip_a_bit(handle):
    size = os.fstat(handle).st_size
    os.pwrite(handle, b"\x01", size - 1)

  monkeypatch.setattr(os, "fsync", flip_a_bit)
  with pytest.raises(errors.CheckpointError, match="read back"):
    _write(tmp_path, {"a": np.zeros(3)})


@pytest.mark.parametrize(
  ("header", "body", "length", "why"),
  [
    ({"a": _entry()}, b"1234567", None, "the file at"),
    ({"a": _entry()}, b"123456789", None, "the file at"),
    ({}, b"", 10**18, "claims"),
    ({}, b"", 2**25, "claims"),
    (b"{" * 100_000, b"", None, "cannot be read"),
    (b"\xff\xfe", b"", None, "cannot be read"),
    (b'{"a": 1, "a": 2}', b"", None, "duplicate"),
    ([], b"", None, "must be an object"),
    ({"a": 3}, b"", None, "not an object"),
    ({"a": _entry("I64", (1,))}, b"12345678", None, "'I64'"),
    ({"a": _entry("F8_E4M3", (8,))}, b"12345678", None, "'F8_E4M3'"),
    ({"../../etc/x": _entry()}, b"12345678", None, "valid tensor name"),
    ({"a" * 999: _entry()}, b"12345678", None, "valid tensor name"),
    ({"a": _entry(["F32"])}, b"12345678", None, "dtype"),
    ({"a": _entry(shape=(3,))}, b"12345678", None, "does not fit"),
    ({"a": _entry(shape=(-2,))}, b"12345678", None, "shape"),
    ({"a": _entry(shape=(2.0,))}, b"12345678", None, "shape"),
    ({"a": _entry(shape=None)}, b"12345678", None, "shape"),
    ({"a": _entry(shape=(2**70,))}, b"12345678", None, "shape"),
    ({"a": _entry(offsets=(8, 0))}, b"12345678", None, "does not fit"),
    ({"a": _entry(offsets=(0, 8, 9))}, b"12345678", None, "offsets"),
    ({"a": _entry(), "b": _entry()}, b"12345678", None, "or in two"),
    ({"a": _entry(offsets=(8, 16))}, b"1" * 16, None, "in no tensor"),
  ],
)
def test_invalid_header_is_rejected(tmp_path, header, body, length, why):
  _raw(tmp_path, header, body, length)
  with pytest.raises(errors.CheckpointError) as caught:
    shards.open_directory(tmp_path)
  assert why in caught.value.why
  assert shards.SINGLE_NAME in caught.value.where


def test_too_many_tensors_are_rejected(tmp_path, monkeypatch):
  monkeypatch.setattr(header, "MAX_TENSORS", 9)
  empty = _entry(shape=(0,), offsets=(0, 0))
  _raw(tmp_path, {str(i): empty for i in range(10)})
  with pytest.raises(errors.CheckpointError, match="at most 9 keys"):
    shards.open_directory(tmp_path)


@pytest.mark.parametrize("size", [0, 3])
def test_file_without_a_header_is_rejected(tmp_path, size):
  (tmp_path / shards.SINGLE_NAME).write_bytes(b"\xff" * size)
  with pytest.raises(errors.CheckpointError):
    shards.open_directory(tmp_path)


@pytest.mark.parametrize(
  "file",
  ["../secret/model-1.safetensors", "/etc/model.safetensors", "a/b", "..", ""],
)
def test_index_that_points_outside_is_rejected(tmp_path, file):
  secret = tmp_path / "secret"
  inside = tmp_path / "model"
  _write(secret, {"a": np.zeros(2)})
  inside.mkdir()
  (inside / shards.INDEX_NAME).write_text(
    json.dumps({"weight_map": {"a": file}})
  )
  with pytest.raises(errors.CheckpointError, match="outside"):
    shards.open_directory(inside)


@hypothesis.settings(
  max_examples=100, derandomize=True, deadline=None, database=None
)
@hypothesis.given(
  strategies.lists(
    strategies.sampled_from(
      ["..", ".", "/", "\\", "\0", "~", "a", "\ud800", " ", "C:", "\n", "%2e"]
    ),
    max_size=5,
  ).map("".join)
)
def test_index_cannot_open_other_files(file):
  with tempfile.TemporaryDirectory() as directory:
    path = pathlib.Path(directory)
    index = json.dumps({"weight_map": {"a": file}})
    (path / shards.INDEX_NAME).write_text(index)
    with pytest.raises(errors.CheckpointError):
      shards.open_directory(path)


@pytest.mark.parametrize(
  "index", ["[]", "{", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}']
)
def test_malformed_index_is_rejected(tmp_path, index):
  (tmp_path / shards.INDEX_NAME).write_text(index)
  with pytest.raises(errors.CheckpointError) as caught:
    shards.open_directory(tmp_path)
  assert shards.INDEX_NAME in caught.value.where


def _sharded(directory):
  return _write(
    directory,
    {name: np.ones(10, ml_dtypes.bfloat16) for name in "abc"},
    dtype="bfloat16",
    shard=20,
  )


def test_missing_and_unlisted_files_are_reported(tmp_path):
  _sharded(tmp_path)
  (tmp_path / "model-00002-of-00003.safetensors").rename(
    tmp_path / "model-00009-of-00009.safetensors"
  )
  with pytest.raises(errors.CheckpointError) as caught:
    shards.open_directory(tmp_path)
  assert "model-00002-of-00003" in caught.value.why
  assert "model-00009-of-00009" in caught.value.why


def test_index_that_differs_from_a_file_is_rejected(tmp_path):
  _sharded(tmp_path)
  path = tmp_path / shards.INDEX_NAME
  path.write_text(path.read_text().replace('"b"', '"other"'))
  with pytest.raises(errors.CheckpointError, match=r"\['b', 'other'\]"):
    shards.open_directory(tmp_path)


def test_truncated_file_is_rejected(tmp_path):
  path = _write(tmp_path, {"a": np.zeros(30)}) / shards.SINGLE_NAME
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(errors.CheckpointError, match="end at byte"):
    shards.open_directory(tmp_path)


def test_pickled_weights_are_never_opened(tmp_path):
  (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
  with pytest.raises(errors.CheckpointError, match="safetensors") as caught:
    shards.open_directory(tmp_path)
  assert "pytorch_model.bin" in caught.value.where


def test_directories_without_weights_are_rejected(tmp_path):
  (tmp_path / "file").write_text("")
  for path in (tmp_path, tmp_path / "absent", tmp_path / "file"):
    with pytest.raises(errors.CheckpointError):
      shards.open_directory(path)


def test_symlinks_of_the_hub_cache_are_followed(tmp_path):
  blobs = _write(tmp_path / "blobs", {"a": np.ones(2)})
  snapshot = tmp_path / "snapshot"
  snapshot.mkdir()
  (snapshot / shards.SINGLE_NAME).symlink_to(blobs / shards.SINGLE_NAME)
  tensors = shards.open_directory(snapshot)
  np.testing.assert_array_equal(shards.read(tensors["a"]), np.ones(2))


def test_write_back_starts_before_the_last_byte(tmp_path, monkeypatch):
  begun = []
  monkeypatch.setattr(shards, "_WRITE_BACK_BYTES", 2**21)
  monkeypatch.setattr(
    os, "posix_fadvise", lambda _, start, size, __: begun.append((start, size))
  )
  array = np.arange(2**21, dtype=np.float32)
  _write(tmp_path, {"a": array})
  size = (tmp_path / shards.SINGLE_NAME).stat().st_size
  assert len(begun) == 4
  assert begun[0][0] == 0
  assert all(a + n == b for (a, n), (b, _) in itertools.pairwise(begun))
  assert sum(n for _, n in begun) <= size
  (tensor,) = shards.open_directory(tmp_path).values()
  np.testing.assert_array_equal(shards.read(tensor), array)
