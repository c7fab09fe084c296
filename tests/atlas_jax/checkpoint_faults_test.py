# SPDX-License-Identifier: Apache-2.0
"""Injects faults of disks and schedulers into saves."""

from concurrent import futures
import os
import pathlib
import shutil
import socket
import subprocess
import sys

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax import checkpoint

_SETTINGS = {
  "identity": {},
  "keep": 3,
  "max_failed": 3,
  "allow_changed": "",
  "best_metric": "",
  "best_mode": "min",
  "load_best": False,
}


def _state(step):
  """Returns incompressible arrays."""
  words = jax.random.bits(jax.random.key(step), (1_500_000,))
  return {"step": jnp.int32(step), "words": words}


def _restored_step(directory):
  """Restores the newest step, checks its values and returns its number."""
  checkpointer = checkpoint.Checkpointer(directory, **_SETTINGS)
  state, host_state = checkpointer.restore_latest(_state(0))
  step = int(state["step"])
  np.testing.assert_array_equal(state["words"], _state(step)["words"])
  assert host_state == {"at": step}
  return step


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
  directory = tmp_path_factory.mktemp("pristine")
  with checkpoint.Checkpointer(directory, **_SETTINGS) as checkpointer:
    for step in (1, 2):
      checkpointer.save(step, _state(step), {}, {"at": step})
  return directory


@pytest.fixture
def saved(pristine, tmp_path):
  return shutil.copytree(pristine, tmp_path / "checkpoints")


def _biggest(directory):
  files = (path for path in directory.rglob("*") if path.is_file())
  return max(files, key=lambda path: path.stat().st_size)


def test_a_flipped_bit_is_not_restored(saved, monkeypatch):
  monkeypatch.setattr(logging, "warning", lambda *_: None)
  path = _biggest(saved / "2")
  content = path.read_bytes()
  for offset in np.random.default_rng(0).integers(len(content), size=20):
    flipped = bytearray(content)
    flipped[offset] ^= 1 << (offset % 8)
    path.write_bytes(flipped)
    checkpointer = checkpoint.Checkpointer(saved, **_SETTINGS)
    assert checkpointer._newest_sound([1, 2]) == 1, offset
  assert _restored_step(saved) == 1


@pytest.mark.parametrize("left", [0.5, 0.0, -1])
def test_a_truncated_file_is_not_restored(saved, left):
  path = _biggest(saved / "2")
  content = path.read_bytes()
  end = int(left * len(content)) if left >= 0 else left
  path.write_bytes(content[:end])
  assert _restored_step(saved) == 1


def test_steps_are_ordered_by_number_not_time(saved):
  shutil.copytree(saved / "1", saved / "10")  # The newest by its number.
  os.utime(saved / "2", (0, 0))
  os.utime(saved / "10", (1, 1))
  assert _restored_step(saved) == 1
  assert checkpoint.Checkpointer(saved, **_SETTINGS).steps() == [1, 2, 10]


# Each scenario is a fork of one Python process, to save startup time.
_DIES = """
import os, pathlib, shutil, signal, sys
import jax.numpy as jnp
from atlas_jax import checkpoint
from atlas_jax import checkpoint_format
from tests.atlas_jax import checkpoint_faults_test as test

def die(*args, **kwargs):
  os.kill(os.getpid(), signal.SIGKILL)

def seal_and_die(*args):
  seal(*args)
  die()

def remove_half_and_die(path):
  test._biggest(pathlib.Path(path)).unlink()
  die()

seal = checkpoint_format.seal
keep = {"keep": 1}
for name, target, attribute, fault, changes in (
  ("committed", checkpoint_format, "seal", die, {}),
  ("sealed", checkpoint_format, "seal", seal_and_die, {}),
  ("removing", shutil, "rmtree", remove_half_and_die, keep),
):
  child = os.fork()
  if child:
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, (name, status)
    continue
  settings = {**test._SETTINGS, **changes}
  directory = pathlib.Path(sys.argv[1]) / name
  saver = checkpoint.Checkpointer(directory, **settings)
  saver.save(1, test._state(1), {}, {"at": 1})
  saver.wait()
  setattr(target, attribute, fault)
  saver.save(2, test._state(2), {}, {"at": 2})
  saver.wait()
  os._exit(1)
"""


def _run(script, *arguments, before=()):
  root = pathlib.Path(__file__).parents[2]
  child = subprocess.run(
    [*before, sys.executable, "-c", script, *map(str, arguments)],
    cwd=root,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert child.returncode == 0, child.stderr
  return child.stderr


@pytest.mark.slow
def test_a_save_killed_between_its_parts_is_complete_or_absent(tmp_path):
  _run(_DIES, tmp_path)
  # Written by orbax but not sealed; sealed but not renamed.
  assert _restored_step(tmp_path / "committed") == 1
  assert _restored_step(tmp_path / "sealed") == 1
  # Killed while the previous step was being removed.
  assert (tmp_path / "removing/1.tmp").exists()
  assert _restored_step(tmp_path / "removing") == 2
  for name in ("committed", "sealed", "removing"):
    (left,) = (tmp_path / name).iterdir()
    assert left.name.isdecimal()


def _mounting(directory):
  """Returns a command prefix with which file systems can be mounted."""
  before = ("unshare", "--map-root-user", "--mount")
  mount = ("mount", "-t", "tmpfs", "x", directory)
  tried = subprocess.run(
    [*before, *mount], check=False, capture_output=True, timeout=30
  )
  if tried.returncode:
    pytest.skip("mounting file systems is not permitted")
  return before


_FULL = """
import pathlib, resource, shutil, subprocess, sys
from atlas_jax import checkpoint
from tests.atlas_jax import checkpoint_faults_test as test

directory, how = pathlib.Path(sys.argv[1]), sys.argv[2]
if how == "tmpfs":
  mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "x", directory]
  subprocess.run(mount, check=True)
saver = checkpoint.Checkpointer(directory, **test._SETTINGS)
limit = resource.getrlimit(resource.RLIMIT_FSIZE)

def save(step):
  saver.save(step, test._state(step), {}, {"at": step})
  saver._settle()

save(1)
save(2)
if how == "limit":
  resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limit[1]))
save(3)
assert saver.steps() == [1, 2], saver.steps()
assert not list(directory.glob("*.tmp"))
assert test._restored_step(directory) == 2
if how == "limit":
  resource.setrlimit(resource.RLIMIT_FSIZE, limit)
else:
  shutil.rmtree(directory / "1")  # Frees space.
save(4)
saver.wait()
assert test._restored_step(directory) == 4
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["limit", "tmpfs"])
def test_training_continues_when_the_disk_is_full(tmp_path, how):
  before = _mounting(tmp_path) if how == "tmpfs" else ()
  stderr = _run(_FULL, tmp_path, how, before=before)
  assert "FAILED TO SAVE CHECKPOINT step=3 failures=1 max_failed=3" in stderr
  assert "GB free" in stderr
  assert "newest step on disk is 2" in stderr


_READ_ONLY = """
import pathlib, subprocess, sys
from atlas_jax import checkpoint, errors
from scripts.job import workdirs
from tests.atlas_jax import checkpoint_faults_test as test

top = pathlib.Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "x", top], check=True)
directory = top / "checkpoints"

def remount(how):
  subprocess.run(["mount", "-o", "remount," + how, top], check=True)

def save(step):
  saver.save(step, test._state(step), {}, {"at": step})
  saver._settle()

saver = checkpoint.Checkpointer(directory, **test._SETTINGS)
save(1)
remount("ro")
save(2)
assert saver.steps() == [1], saver.steps()
remount("rw")
assert test._restored_step(directory) == 1
save(3)
saver.wait()
assert test._restored_step(directory) == 3
# A run that starts with a read-only directory is rejected.
remount("ro")
for begin in (
  lambda: checkpoint.Checkpointer(directory, **test._SETTINGS),
  lambda: workdirs.lock(top).__enter__(),
):
  try:
    begin()
  except errors.ConfigError as error:
    assert "Read-only file system" in error.why, error
    print(error.exit_code)
"""


@pytest.mark.slow
def test_a_read_only_directory_is_logged_and_rejected_at_start(
  tmp_path,
):
  stderr = _run(_READ_ONLY, tmp_path, before=_mounting(tmp_path))
  assert "FAILED TO SAVE CHECKPOINT step=2" in stderr
  assert "Read-only file system" in stderr


_TWO = """
import pathlib, sys
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from atlas_jax import checkpoint
from scripts.job import preemption
from tests.atlas_jax import checkpoint_faults_test as test

rank, port, directory = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
auto = (jax.sharding.AxisType.Auto,)
mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=auto)
rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
best = {"best_metric": "loss", "load_best": True}

def state(step):
  make = jax.jit(lambda: jnp.arange(16.0) + step, out_shardings=rows)
  return {"params": make()}

def check(found, step):
  for shard in found["params"].addressable_shards:
    assert (shard.data == jnp.arange(16.0)[shard.index] + step).all()

def open_saver():
  return checkpoint.Checkpointer(directory, **{**test._SETTINGS, **best})

with preemption.listen() as should_stop, open_saver() as saver:
  for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
    assert not should_stop()
    assert saver.is_best({"loss": loss}) == (step < 3)
    saver.save(step, state(step), {"loss": loss}, {"at": step})
check(saver.restore_final(state(0)), 2)
if rank == 0:
  test._biggest(directory / "3").unlink()
multihost_utils.sync_global_devices("damaged")
with open_saver() as saver:
  found, host_state = saver.restore_latest(state(0))
  check(found, 2)
  assert host_state == {"at": 2}
  saver.save(3, state(3), {}, {"at": 3})
multihost_utils.sync_global_devices("saved")
assert saver.steps() == [1, 2, 3]
"""


@pytest.mark.slow
def test_two_processes_save_and_resume_together(tmp_path):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  with futures.ThreadPoolExecutor(2) as threads:
    ends = [threads.submit(_run, _TWO, i, port, tmp_path) for i in range(2)]
  for end in ends:
    end.result()
