# SPDX-License-Identifier: Apache-2.0
"""Several processes write the same directory as one, or none."""

import concurrent.futures
import os
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax import errors
from conversion import card, process_group, save, shards
from tests import tiny

_MAX_S = 60


def _run(act, count):
  """Calls `act` with the share of each process; the processes are threads."""
  barrier = threading.Barrier(count, timeout=_MAX_S)
  texts = [""] * count

  def share_of(index):
    def exchange(text):
      texts[index] = text + "  "  # distributed.exchange may pad it.
      barrier.wait()
      replies = list(texts)
      barrier.wait()
      return replies

    return process_group.ProcessShare(index, count, exchange)

  with concurrent.futures.ThreadPoolExecutor(count) as pool:
    return [pool.submit(act, share_of(index)) for index in range(count)]


@pytest.fixture
def job(tmp_path):
  """Returns a function that calls `save.write`, and the parameters."""
  model = tiny.build("phi3")
  params = tiny.params_of(model)
  source = tiny.write_source(tmp_path / "source", "phi3")

  def write(directory, share, params=params, watch=lambda _: None):
    tensors = save.Tensors(params, model, "float32")

    def fetch(name):
      watch(name)
      return tensors.fetch(name)

    save.write(
      directory,
      fetch,
      model,
      source=source,
      dtype="float32",
      max_shard_bytes=3000,
      about=card.Card(base="test"),
      overwrite=False,
      share=share,
      on_skip=watch,
    )

  return write, params


@pytest.mark.parametrize("count", [2, 3])
def test_processes_write_the_same_files_as_one(tmp_path, job, count):
  write, _ = job
  write(tmp_path / "one", process_group.ALONE)
  orders = {}

  def act(share):
    order = orders.setdefault(share.index, [])
    write(tmp_path / "many", share, watch=order.append)

  for done in _run(act, count):
    done.result()

  names = sorted(os.listdir(tmp_path / "one"))
  assert len(names) > 10
  assert sorted(os.listdir(tmp_path / "many")) == names
  for name in names:
    one, many = (
      (tmp_path / run / name).read_bytes() for run in ("one", "many")
    )
    assert one == many, name
  # Processes that gather different tensors would deadlock.
  assert all(order == orders[0] for order in orders.values())
  assert sorted(orders[0]) == sorted(set(orders[0]))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_files_are_distributed_by_size(count):
  sizes = {f"file {i}": 10 for i in range(9)} | {"last": 4}
  parts = process_group.divide(sizes, count)
  assert sorted(name for part in parts for name in part) == sorted(sizes)
  held = [sum(sizes[name] for name in part) for part in parts]
  assert max(held) - min(held) <= 10


def test_each_process_writes_only_its_share(tmp_path):
  names = list("abcdef")
  written = []

  def act(share):
    return shards.write_files(
      tmp_path,
      {f"{name}.safetensors": [name] for name in names},
      dict.fromkeys(names, (5,)),
      lambda name: written.append(name) or np.zeros(5),
      dtype="float32",
      share=share,
    )

  digests = [done.result() for done in _run(act, 2)]
  assert [len(each) for each in digests] == [3, 3]
  assert sorted(written) == names


@pytest.mark.parametrize("who", [0, 1])
def test_non_finite_value_in_one_process_stops_all(tmp_path, job, who):
  write, params = job
  bad = jax.tree.map(lambda x: x.at[:].set(jnp.nan), params)

  def act(share):
    write(tmp_path / "out", share, bad if share.index == who else params)

  ends = [done.exception() for done in _run(act, 2)]
  assert "not finite" in ends[who].what
  assert "process" in ends[1 - who].where
  assert "not finite" in ends[1 - who].why
  assert all(isinstance(end, errors.CheckpointError) for end in ends)
  assert sorted(os.listdir(tmp_path)) == ["source"]


def test_disk_error_in_one_process_stops_all(tmp_path, job, monkeypatch):
  write, _ = job
  fsync, failing = os.fsync, []

  def fail(handle):
    if "00003-of" in os.readlink(f"/proc/self/fd/{handle}"):
      failing.append(handle)
      raise OSError(28, "No space left on device")
    fsync(handle)

  monkeypatch.setattr(os, "fsync", fail)
  ends = [
    done.exception() for done in _run(lambda s: write(tmp_path / "out", s), 2)
  ]
  assert failing
  assert all(isinstance(end, errors.CheckpointError) for end in ends)
  assert all("No space left" in end.why for end in ends)
  assert sorted(os.listdir(tmp_path)) == ["source"]


def test_target_in_use_stops_all(tmp_path, job):
  write, _ = job
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "notes.txt").write_text("mine")
  ends = [
    done.exception() for done in _run(lambda s: write(tmp_path / "out", s), 2)
  ]
  assert isinstance(ends[0], errors.ConfigError)
  assert "in use" in ends[1].why
  assert os.listdir(tmp_path / "out") == ["notes.txt"]
