# SPDX-License-Identifier: Apache-2.0
"""Tests saving, restoring and rejecting checkpoints."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax import checkpoint, checkpoint_format, errors

_IDENTITY = {"data": "abc"}


def _state(value):
  return {
    "weights": jnp.full((4, 3), value, jnp.float32),
    "step": jnp.int32(value),
    "none": None,
  }


def _open(tmp_path, **changes):
  arguments = {
    "identity": _IDENTITY,
    "keep": 3,
    "max_failed": 2,
    "allow_changed": "",
    "best_metric": "",
    "best_mode": "min",
    "load_best": False,
    **changes,
  }
  return checkpoint.Checkpointer(tmp_path / "checkpoints", **arguments)


def _save(checkpointer, step, metrics=None):
  checkpointer.save(step, _state(step), metrics or {}, {"at": step})
  checkpointer.wait()


def _saved(tmp_path, *steps):
  checkpointer = _open(tmp_path)
  for step in steps:
    _save(checkpointer, step)
  return tmp_path / "checkpoints"


def _restored_step(tmp_path):
  state, host_state = _open(tmp_path).restore_latest(_state(0))
  assert host_state == {"at": int(state["step"])}
  return int(state["step"])


def _files(directory):
  return sorted(path for path in directory.rglob("*") if path.is_file())


def test_restores_saved_arrays_and_sharding(tmp_path):
  mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
  weights = jax.device_put(jnp.arange(16, dtype=jnp.bfloat16), rows)
  with _open(tmp_path) as checkpointer:
    checkpointer.save(7, {"w": weights}, {}, {})
  empty = {"w": jnp.zeros_like(weights, device=rows)}
  found = _open(tmp_path).restore_latest(empty)[0]["w"]
  np.testing.assert_array_equal(found, weights)
  assert (found.dtype, found.sharding) == (weights.dtype, rows)


def test_without_a_checkpoint_the_state_is_returned_unchanged(tmp_path):
  state = _state(5)
  found, host_state = _open(tmp_path).restore_latest(state)
  assert found is state
  assert host_state == {}


def _flip_bit(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def _truncate(path):
  path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
  "damage", [_flip_bit, _truncate, lambda path: path.unlink()]
)
def test_a_damaged_file_falls_back_to_the_previous_step(
  tmp_path, damage, monkeypatch
):
  warnings = []
  monkeypatch.setattr(logging, "warning", lambda *args: warnings.append(args))
  pristine = _saved(tmp_path / "pristine", 1, 2)
  names = [
    path.relative_to(pristine / "2")
    for path in _files(pristine / "2")
    if path.stat().st_size
  ]
  assert {"manifest.json", "host_state.json", "about.json"} <= {
    str(name) for name in names
  }
  # One file of each kind.
  for name in [*names[:4], names[-1]]:
    directory = tmp_path / "checkpoints"
    subprocess.run(["cp", "-r", pristine, directory], check=True)
    damage(directory / "2" / name)
    assert _restored_step(tmp_path) == 1, name
    (message,) = (args[0] % args[1:] for args in warnings)
    assert str(directory / "2") in message
    # A changed digest in the manifest is reported for the file it belongs to.
    assert str(name) in message or str(name) == "manifest.json"
    warnings.clear()
    subprocess.run(["rm", "-r", directory], check=True)


def test_a_damaged_step_can_be_saved_again(tmp_path):
  directory = _saved(tmp_path, 1, 2)
  (directory / "2/manifest.json").unlink()
  checkpointer = _open(tmp_path, keep=1)
  checkpointer.restore_latest(_state(0))
  assert checkpointer.steps() == [1]
  assert (directory / "2.damaged").exists()
  _save(checkpointer, 2)
  assert checkpointer.steps() == [2]
  assert _restored_step(tmp_path) == 2


def test_if_all_steps_are_damaged_nothing_is_restored_or_removed(tmp_path):
  directory = _saved(tmp_path, 1, 2)
  for step in (1, 2):
    (directory / f"{step}/manifest.json").write_text("{}")
  before = _files(directory)
  with pytest.raises(errors.CheckpointError, match=r"Steps \[1, 2\]"):
    _restored_step(tmp_path)
  assert _files(directory) == before


def test_another_identity_is_rejected_with_both_values(tmp_path):
  _saved(tmp_path, 1)
  with pytest.raises(errors.CheckpointError) as caught:
    _open(tmp_path, identity={"data": "xyz"}).restore_latest(_state(0))
  assert "another data" in caught.value.what
  assert caught.value.why.split() == ["then", "now", "data", "abc", "xyz"]


def test_an_allowed_change_of_optimizer_resets_its_state(tmp_path):
  def state(value, moments):
    params = {"w": jnp.full((4, 3), value)}
    reference = None
    return {"opt_state": moments, "params": params, "reference": reference}

  adam = {"mu": {"w": jnp.ones((4, 3))}, "count": jnp.int32(7)}
  sgd = (jnp.int32(0), None)
  with _open(tmp_path, identity={"optimizer": "adamw"}) as checkpointer:
    checkpointer.save(1, state(1.0, adam), {}, {})

  other = {"identity": {"optimizer": "sgd"}}
  with pytest.raises(errors.CheckpointError) as caught:
    _open(tmp_path, **other).restore_latest(state(0.0, sgd))
  assert "allow_changed=optimizer" in caught.value.fix
  other["allow_changed"] = "optimizer, data"
  with _open(tmp_path, **other) as checkpointer:
    found, _ = checkpointer.restore_latest(state(0.0, sgd))
    assert found["params"]["w"][0, 0] == 1.0
    assert found["opt_state"] == sgd
    checkpointer.save(2, state(2.0, (jnp.int32(5), None)), {}, {})
  # The new optimizer's state is now restored.
  found, _ = _open(tmp_path, **other).restore_latest(state(0.0, sgd))
  assert found["opt_state"][0] == 5


def test_only_allowed_changes_are_accepted(tmp_path):
  _saved(tmp_path, 1)
  allowed = {"allow_changed": "data"}
  state, _ = _open(
    tmp_path, identity={"data": "xyz"}, **allowed
  ).restore_latest(_state(0))
  assert state["step"] == 1
  both = {"data": "xyz", "model.width": "7"}
  with pytest.raises(
    errors.CheckpointError, match=r"data and model\.width"
  ) as caught:
    _open(tmp_path, identity=both, **allowed).restore_latest(_state(0))
  assert "allow" not in caught.value.fix  # Not possible for model.width.
  with pytest.raises(errors.ConfigError, match="allow_changed=model"):
    _open(tmp_path, allow_changed="model")


@pytest.mark.parametrize(
  "other",
  [
    {**_state(0), "weights": jnp.zeros((4, 4))},
    {**_state(0), "weights": jnp.zeros((2, 3))},
    {**_state(0), "more": jnp.zeros(())},
    {"weights": jnp.zeros((4, 3))},
    {**_state(0), "none": jnp.zeros(())},
    {**_state(0), "step": jnp.float32(0)},
  ],
)
def test_a_state_of_another_shape_is_rejected(tmp_path, other):
  _saved(tmp_path, 1)
  with pytest.raises(errors.CheckpointError, match="1 arrays differ"):
    _open(tmp_path).restore_latest(other)


def test_only_the_newest_steps_are_kept(tmp_path):
  checkpointer = _open(tmp_path, keep=2)
  for step in (1, 2, 9, 10):
    _save(checkpointer, step)
  assert checkpointer.steps() == [9, 10]


def _saved_by_loss(tmp_path, losses, **changes):
  """Saves a step per loss; None is a step without an evaluation."""
  checkpointer = _open(
    tmp_path, best_metric="loss", **{"keep": 1, "best_mode": "min", **changes}
  )
  for step, loss in enumerate(losses, start=1):
    metrics = {} if loss is None else {"loss": loss, "more": 0.0}
    _save(checkpointer, step, metrics)
  return checkpointer


@pytest.mark.parametrize(
  ("mode", "losses", "kept"),
  [
    ("min", [3.0, 1.0, 2.0, None], [2, 4]),
    ("max", [3.0, 1.0, 2.0, None], [1, 4]),
    ("min", [3.0, 1.0, 1.0, 2.0], [2, 4]),
    ("min", [float("nan"), 3.0, float("nan")], [2, 3]),
    ("min", [3.0, 2.0, 1.0], [3]),
    ("min", [None, None], [2]),
  ],
)
def test_the_best_step_is_kept_with_the_newest(tmp_path, mode, losses, kept):
  assert _saved_by_loss(tmp_path, losses, best_mode=mode).steps() == kept


def test_the_best_step_is_known_after_a_restart(tmp_path):
  _saved_by_loss(tmp_path, [3.0, 1.0, 2.0])
  again = _open(tmp_path, keep=1, best_metric="loss")
  assert again.best_step() == 2
  found = [again.is_best({"loss": x}) for x in (1.5, 1.0, 0.9, float("nan"))]
  assert found == [False, False, True, False]
  _save(again, 4, {"loss": 1.5})
  assert again.steps() == [2, 4]
  _save(again, 5, {"loss": 0.5})
  assert again.steps() == [5]


def test_without_best_metric_there_is_no_best_step(tmp_path):
  checkpointer = _open(tmp_path)
  assert not checkpointer.is_best({"loss": 1.0})
  _save(checkpointer, 1, {"loss": 1.0})
  assert checkpointer.best_step() is None


def test_an_unknown_best_metric_is_rejected_with_the_known_ones(tmp_path):
  checkpointer = _open(tmp_path, best_metric="eval/los")
  with pytest.raises(errors.ConfigError, match="eval/loss"):
    checkpointer.is_best({"eval/loss": 1.0})


def test_load_best_restores_the_best_step(tmp_path):
  checkpointer = _saved_by_loss(tmp_path, [3.0, 1.0, 2.0], load_best=True)
  assert checkpointer.restore_final(_state(0))["step"] == 2
  assert _open(tmp_path).restore_final(_state(7))["step"] == 7


def test_a_damaged_or_missing_best_step_is_rejected(tmp_path):
  checkpointer = _saved_by_loss(tmp_path, [None], load_best=True)
  with pytest.raises(errors.CheckpointError, match="evaluated by loss"):
    checkpointer.restore_final(_state(0))
  checkpointer = _saved_by_loss(tmp_path / "b", [1.0, 2.0], load_best=True)
  (tmp_path / "b/checkpoints/1/manifest.json").write_text("{}")
  with pytest.raises(errors.CheckpointError, match="Step 1 does not match"):
    checkpointer.restore_final(_state(0))


@pytest.mark.parametrize(
  "changes", [{"best_mode": "least"}, {"load_best": True}]
)
def test_invalid_best_settings_are_rejected(tmp_path, changes):
  with pytest.raises(errors.ConfigError, match="best_mode"):
    _open(tmp_path, **changes)


def test_keep_of_zero_is_rejected(tmp_path):
  with pytest.raises(errors.ConfigError, match="keep"):
    _open(tmp_path, keep=0)


def test_saved_arrays_may_be_donated_during_the_write(tmp_path):
  update = jax.jit(lambda x: x + 1, donate_argnums=0)
  state = jnp.zeros(1_000_000)
  with _open(tmp_path) as checkpointer:
    for step in (1, 2):
      state = update(state)
      checkpointer.save(step, {"w": state}, {}, {})
      for _ in range(20):
        state = update(state)
  empty = {"w": jnp.ones(1_000_000)}
  restored = _open(tmp_path).restore_latest(empty)[0]["w"]
  assert set(np.asarray(restored)) == {22.0}


def _fails(monkeypatch, *, times):
  """Makes the next `times` saves fail with a full disk."""
  left = [True] * times
  seal = checkpoint_format.seal

  def full(*args):
    if left:
      left.pop()
      raise OSError(28, "No space left on device")
    seal(*args)

  monkeypatch.setattr(checkpoint_format, "seal", full)


def test_a_failed_save_is_logged_and_the_next_one_succeeds(
  tmp_path, monkeypatch
):
  logged = []
  monkeypatch.setattr(logging, "error", lambda *args: logged.append(args))
  checkpointer = _open(tmp_path)
  _save(checkpointer, 1)
  _fails(monkeypatch, times=1)
  checkpointer.save(2, _state(2), {}, {})
  checkpointer._saving[1].exception()  # Waits without handling the failure.
  assert logged == []
  checkpointer.poll()
  assert "No space left" in logged[0][0] % logged[0][1:]
  assert checkpointer.steps() == [1]
  _save(checkpointer, 3)
  assert checkpointer.steps() == [1, 3]
  assert not list((tmp_path / "checkpoints").glob("*.tmp"))


def test_too_many_consecutive_failed_saves_stop_the_run(tmp_path, monkeypatch):
  checkpointer = _open(tmp_path, max_failed=2)
  _save(checkpointer, 1)
  _fails(monkeypatch, times=2)
  checkpointer.save(2, _state(2), {}, {})
  checkpointer.save(3, _state(3), {}, {})
  with pytest.raises(
    errors.CheckpointError, match="2 saves in a row"
  ) as caught:
    checkpointer.save(4, _state(4), {}, {})
  assert caught.value.exit_code == 5
  assert _restored_step(tmp_path) == 1


def test_a_failed_last_save_is_an_error(tmp_path, monkeypatch):
  _fails(monkeypatch, times=2)

  def run(error=None):
    with _open(tmp_path) as checkpointer:
      checkpointer.save(1, _state(1), {}, {})
      if error is not None:
        raise error

  with pytest.raises(errors.CheckpointError, match="last save"):
    run()
  # The exception that stopped the run is not replaced.
  with pytest.raises(ZeroDivisionError):
    run(ZeroDivisionError())


def test_a_failed_save_is_not_the_best_step(tmp_path, monkeypatch):
  checkpointer = _saved_by_loss(tmp_path, [2.0], max_failed=9)
  _fails(monkeypatch, times=1)
  checkpointer.save(2, _state(2), {"loss": 1.0}, {})
  assert not checkpointer.is_best({"loss": 1.5})
  checkpointer._settle()
  assert checkpointer.is_best({"loss": 1.5})
  assert checkpointer.best_step() == 1


def test_a_removed_directory_is_created_again(tmp_path):
  checkpointer = _open(tmp_path)
  _save(checkpointer, 1)
  shutil.rmtree(tmp_path / "checkpoints")
  _save(checkpointer, 2)
  assert checkpointer.steps() == [2]


def test_an_unwritable_directory_is_rejected(tmp_path):
  (tmp_path / "checkpoints").write_text("")
  with pytest.raises(errors.ConfigError, match="not writable"):
    _open(tmp_path)


def _rows_over(num_devices):
  mesh = jax.make_mesh(
    (num_devices,),
    ("x",),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=jax.devices()[:num_devices],
  )
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))


def test_another_mesh_is_logged_and_restored(tmp_path, monkeypatch):
  warnings = []
  monkeypatch.setattr(logging, "warning", lambda *args: warnings.append(args))
  spread = jax.device_put(jnp.arange(16.0), _rows_over(8))
  with _open(tmp_path) as checkpointer:
    checkpointer.save(1, {"w": spread}, {}, {})
  (about,) = (tmp_path / "checkpoints").glob("*/about.json")
  assert json.loads(about.read_text())["environment"]["mesh"] == "x=8"
  _open(tmp_path).restore_latest({"w": spread})
  assert warnings == []
  for here in (jnp.zeros(16, device=_rows_over(4)), jnp.zeros(16)):
    found = _open(tmp_path).restore_latest({"w": here})[0]["w"]
    np.testing.assert_array_equal(found, np.arange(16.0))
    assert found.sharding == here.sharding
    warning = warnings.pop()
    assert "x=8" in warning[0] % warning[1:]


def test_other_versions_are_logged_and_restored(tmp_path, monkeypatch):
  _saved(tmp_path, 1)
  warnings = []
  monkeypatch.setattr(logging, "warning", lambda *args: warnings.append(args))
  here = checkpoint_format.environment(_state(0))
  monkeypatch.setattr(
    checkpoint_format, "environment", lambda _: {**here, "jaxlib": "9.9"}
  )
  assert _restored_step(tmp_path) == 1
  (message,) = (args[0] % args[1:] for args in warnings)
  assert "may not match bit for bit" in message
  assert message.split()[-3:] == ["jaxlib", here["jaxlib"], "9.9"]


def test_digests_of_a_damaged_file_are_reported(tmp_path):
  directory = _saved(tmp_path, 1)
  path = directory / "1/host_state.json"
  written = hashlib.sha256(path.read_bytes()).hexdigest()
  path.write_text("{}")
  found = hashlib.sha256(b"{}").hexdigest()
  assert checkpoint_format.damage(directory / "1") == (
    f"host_state.json has SHA-256 {found[:12]}, not {written[:12]}"
  )
  path.unlink()
  assert (
    checkpoint_format.damage(directory / "1") == "host_state.json is missing"
  )


def test_no_flipped_bit_in_json_files_stops_a_run(tmp_path):
  """Covers invalid JSON, and valid JSON with missing or changed keys."""
  directory = _saved(tmp_path, 1, 2)
  for name in ("about.json", "manifest.json"):
    path = directory / "2" / name
    content = path.read_bytes()
    for offset in range(0, len(content), 5):
      flipped = bytearray(content)
      flipped[offset] ^= 1 << (offset % 7)
      path.write_bytes(flipped)
      assert (
        checkpoint_format.read(directory / "2") is None or name != "about.json"
      )
      assert checkpoint_format.damage(directory / "2"), (name, offset)
    assert _open(tmp_path)._newest_sound([1, 2]) == 1
    path.write_bytes(content)


def test_another_format_is_rejected_with_a_fix(tmp_path):
  directory = _saved(tmp_path, 1) / "1"
  about = json.loads((directory / "about.json").read_text())
  checkpoint_format.seal(directory, {**about, "format": 1}, {})
  with pytest.raises(errors.CheckpointError, match="another release") as caught:
    _open(tmp_path)
  assert "Its format is 1; this release reads" in caught.value.why
  assert "with the release that started it" in caught.value.fix
  assert "--config.model.path" in caught.value.fix


def test_partial_steps_of_killed_saves_are_removed(tmp_path):
  directory = _saved(tmp_path, 1)
  (directory / "2.tmp/state").mkdir(parents=True)
  (directory / "2.tmp/state/d").write_text("half")
  assert _restored_step(tmp_path) == 1
  assert [path.name for path in directory.iterdir()] == ["1"]


_SAVES_FOREVER = """
import pathlib, sys
import jax.numpy as jnp
from atlas_jax import checkpoint

saver = checkpoint.Checkpointer(
  pathlib.Path(sys.argv[1]),
  identity={"data": "abc"},
  keep=3,
  max_failed=2,
  allow_changed="",
  best_metric="",
  best_mode="min",
  load_best=False,
)
state, _ = saver.restore_latest({"w": jnp.zeros(300_000)})
step = int(state["w"][0])
while True:
  step += 1
  saver.save(step, {"w": jnp.full(300_000, float(step))}, {}, {})
  saver.wait()
  print(step, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [0.0, 0.015, 0.04])
def test_a_killed_save_loses_at_most_its_own_step(tmp_path, delay_s):
  directory = tmp_path / "checkpoints"
  child = subprocess.Popen(
    [sys.executable, "-c", _SAVES_FOREVER, str(directory)],
    stdout=subprocess.PIPE,
    text=True,
  )
  for _ in range(2):
    done = int(child.stdout.readline())
  time.sleep(delay_s)
  child.send_signal(signal.SIGKILL)
  more = child.communicate(timeout=30)[0].split()
  done = int(more[-1]) if more else done
  wanted = {"w": jnp.zeros(300_000)}
  restored = _open(tmp_path).restore_latest(wanted)[0]["w"]
  # The kill may occur between the rename and the printed line.
  assert restored[0] in (done, done + 1)
  assert (restored == restored[0]).all()
  assert not list(directory.glob("*.tmp"))


def test_manifest_has_the_digest_of_every_file(tmp_path):
  directory = _saved(tmp_path, 1) / "1"
  manifest = json.loads((directory / "manifest.json").read_text())
  names = {p.relative_to(directory).as_posix() for p in _files(directory)}
  assert set(manifest) == names - {"manifest.json"}


def test_resuming_and_loading_the_best_need_no_second_copy(tmp_path):
  def state(value):
    return {
      "step": jnp.int32(value),
      "params": jnp.full((1000, 1000), float(value)),
      "opt_state": jnp.full((1000, 1000), float(value)),
    }

  def live_bytes():
    return sum(leaf.nbytes for leaf in jax.live_arrays())

  checkpointer = _open(tmp_path, best_metric="loss", load_best=True)
  checkpointer.save(1, state(1), {"loss": 1.0}, {})
  checkpointer.wait()
  initial = state(0)  # As callers do, this test keeps it.
  before = live_bytes()
  resumed, _ = checkpointer.restore_latest(initial)
  assert live_bytes() <= before + 1000
  assert initial["params"].is_deleted()
  final = checkpointer.restore_final(resumed)
  assert live_bytes() <= before + 1000
  # The best step has other parameters; the rest of the state is the last.
  assert final["opt_state"] is resumed["opt_state"]
