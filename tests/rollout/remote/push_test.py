# SPDX-License-Identifier: Apache-2.0
"""A published version is complete or absent."""

import concurrent.futures
import ctypes
import os
import pathlib
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax import errors, sharding
from conversion import load, process_group, rules, save, shards
from rollout import manifest
from rollout.remote import push
from tests import tiny


@pytest.fixture(scope="module")
def model():
  return tiny.build("qwen2")


@pytest.fixture(scope="module")
def params(model):
  return tiny.params_of(model)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  return tiny.write_source(tmp_path_factory.mktemp("s") / "model", "qwen2")


@pytest.fixture
def publish(model, params, source, tmp_path):
  def run(version, params=params, dtype="float32", shard=10**9, root=tmp_path):
    return push.publish(
      params,
      model,
      root,
      version,
      source=source,
      dtype=dtype,
      max_shard_bytes=shard,
    )

  return run


def _verify(published, model):
  return manifest.verify(
    published.path.parent,
    version=published.version,
    digest=published.digest,
    shapes=rules.shapes(model),
  )


def _listing(root):
  return {
    str(path.relative_to(root)): path.read_bytes()
    for path in root.rglob("*")
    if path.is_file()
  }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shard", [10**9, 3000])
def test_published_weights_verify_and_load_bit_for_bit(
  publish, model, params, dtype, shard
):
  published = publish(7, dtype=dtype, shard=shard)
  path = _verify(published, model)
  assert path == published.path
  assert (len(list(path.glob("*.safetensors"))) > 1) == (shard == 3000)
  loaded = load.load(path, model, param_dtype="float32")
  jax.tree.map(
    lambda x, y: np.testing.assert_array_equal(
      x, y.astype(dtype).astype(jnp.float32)
    ),
    loaded,
    params,
  )


def test_sharded_parameters_are_published_identically(tmp_path):
  sizes = {"vocab_size": 40, "hidden_size": 24, "num_attention_heads": 4}
  sizes["num_key_value_heads"] = 2
  source = tiny.write_source(tmp_path / "source", "qwen2", **sizes)
  model = tiny.build("qwen2", **sizes)
  params = tiny.params_of(model)
  mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
  spread = jax.device_put(params, sharding.of_params(mesh, params))
  digests = {
    push.publish(
      each,
      model,
      tmp_path,
      1,
      source=source,
      dtype="float32",
      max_shard_bytes=3000,  # Several files, hence several threads.
    ).digest
    for each in (params, spread)
  }
  assert len(digests) == 1


@pytest.mark.parametrize("bad", [None, 0, 1])
def test_processes_publish_one_version_or_none(
  publish, params, model, source, tmp_path, bad
):
  for name in ("alone", "shared"):
    (tmp_path / name).mkdir()
  publish(1, shard=3000, root=tmp_path / "alone")
  nan = jax.tree.map(lambda x: x.at[:].set(jnp.nan), params)
  barrier, texts = threading.Barrier(2, timeout=60), ["", ""]

  def act(index):
    def exchange(text):
      texts[index] = text
      barrier.wait()
      replies = list(texts)
      barrier.wait()
      return replies

    return push.publish(
      nan if index == bad else params,
      model,
      tmp_path / "shared",
      1,
      source=source,
      dtype="float32",
      max_shard_bytes=3000,
      share=process_group.ProcessShare(index, 2, exchange),
    )

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    runs = [pool.submit(act, index) for index in range(2)]
  if bad is None:
    assert runs[0].result().digest == runs[1].result().digest
    _verify(runs[0].result(), model)
    # The manifests list the files in different orders.
    alone, shared = (_listing(tmp_path / name) for name in ("alone", "shared"))
    del alone["1/manifest.json"], shared["1/manifest.json"]
    assert shared == alone
    return
  failed = [run.exception() for run in runs]
  assert isinstance(failed[bad], errors.DivergedError)
  assert isinstance(failed[1 - bad], errors.CheckpointError)
  assert not list((tmp_path / "shared").iterdir())


def test_bytes_are_counted_and_digests_follow_the_weights(publish, params):
  first = publish(1)
  assert first.num_bytes == sum(
    path.stat().st_size
    for path in first.path.iterdir()
    if path.name != manifest.NAME
  )
  other = jax.tree.map(lambda x: x + 1.0, params)
  assert publish(1, params=other).digest != first.digest


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3.4e38])
def test_non_finite_weights_are_never_published(publish, params, tmp_path, bad):
  publish(1)
  before = _listing(tmp_path)
  poisoned = {**params, "final_norm": {"scale": params["final_norm"]["scale"]}}
  poisoned["final_norm"]["scale"] = params["final_norm"]["scale"].at[3].set(bad)
  with pytest.raises(errors.DivergedError) as caught:
    publish(2, params=poisoned, dtype="bfloat16")
  assert caught.value.where == "model.norm.weight"
  assert caught.value.exit_code == errors.Exit.DIVERGED
  assert _listing(tmp_path) == before


_STAGES = {
  "a file": (os, "fsync"),
  "the manifest": (manifest, "write"),
  "the rename": (pathlib.Path, "rename"),
}


@pytest.mark.parametrize(
  "error", [OSError(28, "No space"), KeyboardInterrupt()]
)
@pytest.mark.parametrize("stage", _STAGES.values(), ids=_STAGES)
def test_interrupted_push_changes_nothing(
  publish, tmp_path, monkeypatch, stage, error
):
  publish(1)
  before = _listing(tmp_path)

  def interrupt(*args, **kwargs):
    del args, kwargs
    raise error

  with monkeypatch.context() as patched:
    patched.setattr(*stage, interrupt)
    with pytest.raises((errors.RolloutError, KeyboardInterrupt)) as caught:
      publish(2)
  assert isinstance(caught.value, errors.RolloutError) == isinstance(
    error, OSError
  )
  assert _listing(tmp_path) == before
  assert [path.name for path in tmp_path.iterdir()] == ["1"]
  publish(2)


def test_leftovers_of_a_killed_trainer_are_not_a_version(
  publish, model, tmp_path
):
  # Killed before the rename: complete, but under the temporary name.
  published = publish(3)
  published.path.rename(tmp_path / "3.tmp-12345")
  with pytest.raises(errors.CheckpointError, match="does not exist"):
    _verify(published, model)
  push.prune(tmp_path, keep=2)
  assert not list(tmp_path.iterdir())


def test_prune_keeps_newest_versions_and_other_files(publish, tmp_path):
  for version in (2, 10, 9):
    publish(version)
  (tmp_path / "notes").mkdir()
  (tmp_path / "4.tmp-99").mkdir()
  push.prune(tmp_path, keep=2)
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {"9", "10", "notes"}


def test_root_is_private_and_can_be_reopened(publish, tmp_path):
  root = push.open_root(str(tmp_path / "a" / "b"), run="x")
  publish(5, root=root)
  assert push.open_root(str(root), run="x") == root
  assert (root / "5").is_dir()
  assert root.stat().st_mode & 0o077 == 0


def test_default_root_is_in_memory_and_private():
  root = push.open_root("", run=f"test-{os.getpid()}")
  try:
    assert root.parent == pathlib.Path(f"/dev/shm/atlas_jax-{os.getuid()}")
    assert root.parent.stat().st_mode & 0o077 == 0
  finally:
    root.rmdir()


def test_uncreatable_root_is_a_config_error(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.ConfigError, match="cannot be created"):
    push.open_root(str(tmp_path / "file" / "root"), run="x")


def test_one_tensor_at_a_time_is_in_memory(publish, model, monkeypatch):
  alive, most = [], []
  fetch = save.Tensors.fetch

  def watched(tensors, name):
    alive[:] = [ref for ref in alive if ref() is not None]
    most.append(len(alive))
    # Copied, since on a CPU the original is the parameter's memory.
    array = np.array(fetch(tensors, name))
    alive.append(weakref.ref(array))
    return array

  monkeypatch.setattr(save.Tensors, "fetch", watched)
  publish(1)
  assert len(most) == len(rules.shapes(model))
  assert max(most) <= 2


@pytest.fixture(scope="module")
def large(tmp_path_factory):
  """Returns a model of 200 MiB in bfloat16; its largest tensor has 32."""
  sizes = {"vocab_size": 2**15, "hidden_size": 512, "intermediate_size": 2048}
  sizes |= {"num_hidden_layers": 24, "head_dim": 64}
  source = tiny.write_source(
    tmp_path_factory.mktemp("l") / "s", "qwen3", **sizes
  )
  model = tiny.build("qwen3", **sizes)
  params = jax.tree.map(lambda x: jnp.ones(x.shape), model.abstract_params)
  return model, jax.block_until_ready(params), source


def _growth(work):
  """Returns the peak memory growth of `work` in MiB, and its result."""
  reset = pathlib.Path("/proc/self/clear_refs")
  if not os.access(reset, os.W_OK):
    pytest.skip("The peak memory cannot be reset on this system.")

  def memory(name):
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
      if line.startswith(name):
        return int(line.split()[1]) / 1024
    raise LookupError(name)

  # Freed memory that malloc retains would hide new allocations.
  ctypes.CDLL(None).malloc_trim(0)
  reset.write_text("5")
  held = memory("VmRSS")
  result = work()
  return memory("VmHWM") - held, result


def test_neither_side_holds_a_second_copy_of_the_weights(
  large, tmp_path, monkeypatch
):
  model, params, source = large
  monkeypatch.setattr(shards, "_MAX_WRITERS", 2)

  def publish():
    return push.publish(
      params,
      model,
      tmp_path,
      1,
      source=source,
      dtype="bfloat16",
      max_shard_bytes=2**25,
    )

  grown, published = _growth(publish)
  total, largest = published.num_bytes / 2**20, 32
  assert total > 200
  assert grown <= 2 * largest * 2 < total
  grown, _ = _growth(lambda: _verify(published, model))
  assert grown <= largest
