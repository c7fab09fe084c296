# SPDX-License-Identifier: Apache-2.0
"""Tests saving, resuming, stopping and non-finite updates of the loop."""

import functools
import hashlib
import json
import threading

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from atlas_jax import checkpoint_format, errors, sharding
from atlas_jax.train import loop, optimizer_step, train_state
from atlas_jax.train import optimizer as train_optimizer
from atlas_jax.train.telemetry import clock, writer
from configs import optimizer as optimizers

_WIDTH = 5


@functools.cache
def _parts():
  mesh = sharding.make_mesh(data=1, fsdp=-1, tensor=1)
  optimizer = train_optimizer.make_optimizer(
    lambda step: 0.1 / (1.0 + step), **optimizers.get_config()
  )

  def loss_fn(params, batch):
    error = jnp.mean(jnp.square(batch["x"] @ params["kernel"] - batch["y"]))
    return error, (jnp.float32(1.0), {"loss": error})

  def state():
    params = {"kernel": jnp.ones(_WIDTH, device=sharding.replicated(mesh))}
    return train_state.create(params, optimizer, mesh=mesh)

  step = optimizer_step.make_step(
    loss_fn,
    optimizer,
    frozen={},
    shardings=train_state.shardings(state()),
  )
  return state, step


class _CrashError(Exception):
  pass


_KEPT = {
  "keep": 9,
  "max_failed": 2,
  "allow_changed": "",
  "best_metric": "",
  "best_mode": "max",
  "load_best": False,
}


def _run(  # `changes` are loop settings.
  workdir,
  *,
  stop_after=None,
  crash_at=None,
  broken=(),
  kept=(),
  on_save=lambda *_: None,
  host_state=(),
  given=None,
  **changes,
):
  """Trains on data drawn per step; steps in `broken` have NaN targets."""
  state, step_fn = _parts()
  done = []

  def do_step(state, step):
    if step == crash_at:
      raise _CrashError
    key = jax.random.fold_in(jax.random.key(0), step)
    x = jax.random.normal(key, (4, _WIDTH))
    y = jnp.full(4, jnp.nan) if step in broken else jnp.ones(4)
    done.append(step)
    return step_fn(state, {"x": x, "y": y})

  def evaluate(state, step):
    del step
    return {"eval/norm": jnp.linalg.norm(state.params["kernel"])}

  arguments = {
    "num_steps": 6,
    "log_every": 1,
    "eval_every": 0,
    "save_every": 2,
    "max_nonfinite": 2,
    "profile_steps": "",
    "watchdog_s": 0.0,
    "require_updates": False,
    **changes,
  }
  config = ml_collections.ConfigDict(
    {"loop": arguments, "checkpoint": {**_KEPT, **dict(kept)}}
  )
  final = loop.train(
    state(),
    loop.Task(
      do_step,
      evaluate,
      lambda step: 0.1 / (1.0 + step),
      row_ids=lambda step: [f"row {step}"],
      clock=clock.Clock(),
      get_host_state=lambda: dict(host_state),
      set_host_state=lambda state: given.append(state),
    ),
    config,
    loop.Run(
      workdir,
      writer.Writer(workdir, ()),
      on_save=on_save,
      should_stop=lambda: done[-1] + 1 == stop_after,
    ),
    num_steps=arguments["num_steps"],
    identity={},
  )
  return final, done


def _hash(state):
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(jax.device_get(state)):
    digest.update(leaf.tobytes())
  return digest.hexdigest()


def _rows(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def _saved(workdir):
  return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def test_a_resumed_run_matches_an_uninterrupted_run_bit_for_bit(tmp_path):
  straight, _ = _run(tmp_path / "straight")
  with pytest.raises(errors.PreemptedError) as caught:
    _run(tmp_path / "resumed", stop_after=3)
  assert caught.value.exit_code == 75
  assert _saved(tmp_path / "resumed") == [2, 3]
  resumed, done = _run(tmp_path / "resumed")
  assert done == [3, 4, 5]
  assert int(resumed.step) == 6
  assert _hash(resumed) == _hash(straight)


def test_after_a_crash_each_step_is_reported_once(tmp_path):
  _run(tmp_path / "straight")
  with pytest.raises(_CrashError):
    _run(tmp_path / "crashed", crash_at=3)
  # Step 3 was logged but not saved, so it is repeated and logged again.
  assert [row["step"] for row in _rows(tmp_path / "crashed")] == [1, 2, 3]
  assert _saved(tmp_path / "crashed") == [2]
  _run(tmp_path / "crashed")
  straight, crashed = _rows(tmp_path / "straight"), _rows(tmp_path / "crashed")
  assert [row["step"] for row in crashed] == [1, 2, 3, 4, 5, 6, 6]
  for old, new in zip(straight, crashed, strict=True):
    assert old.get("loss") == new.get("loss")
    assert old.get("eval/norm") == new.get("eval/norm")


def test_a_crash_propagates_and_leaves_no_thread(tmp_path, monkeypatch):
  def fail(*_):
    raise OSError(28, "No space left on device")

  _run(tmp_path / "before")  # Starts the threads JAX and orbax keep.
  before = set(threading.enumerate())
  # The last save fails too; the writer is still closed.
  monkeypatch.setattr(checkpoint_format, "seal", fail)
  with pytest.raises(_CrashError):
    _run(tmp_path / "run", crash_at=3, watchdog_s=60.0)
  for thread in set(threading.enumerate()) - before:
    thread.join(10.0)
    assert not thread.is_alive(), thread
  assert [row["step"] for row in _rows(tmp_path / "run")] == [1, 2, 3]


def test_the_last_step_is_always_saved_and_evaluated(tmp_path):
  _run(tmp_path, num_steps=5, log_every=2, eval_every=3, save_every=2)
  assert _saved(tmp_path) == [2, 4, 5]
  rows = _rows(tmp_path)
  assert [row["step"] for row in rows if "loss" in row] == [2, 4, 5]
  assert [row["step"] for row in rows if "eval/norm" in row] == [3, 5]


def test_metrics_are_logged_before_a_save(tmp_path):
  with pytest.raises(_CrashError):
    _run(tmp_path, log_every=4, save_every=2, crash_at=3)
  assert [row["step"] for row in _rows(tmp_path)] == [2]
  _run(tmp_path, log_every=4, save_every=2)
  assert [r["step"] for r in _rows(tmp_path) if "loss" in r] == [2, 4, 6]


def test_training_continues_after_a_failed_save(tmp_path, monkeypatch):
  seal = checkpoint_format.seal

  def fail_once(directory, *args):
    if directory.name == "2.tmp":
      raise OSError(28, "No space left on device")
    seal(directory, *args)

  monkeypatch.setattr(checkpoint_format, "seal", fail_once)
  _, done = _run(tmp_path)
  assert len(done) == 6
  assert _saved(tmp_path) == [4, 6]


def test_failing_saves_raise_checkpoint_error(tmp_path, monkeypatch):
  def fail(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(checkpoint_format, "seal", fail)
  with pytest.raises(errors.CheckpointError, match="in a row failed"):
    _run(tmp_path, kept={"max_failed": 2})
  with pytest.raises(errors.CheckpointError, match="last save"):
    _run(tmp_path, kept={"max_failed": 9})


def test_host_state_is_restored_before_the_first_step(tmp_path):
  given = []
  with pytest.raises(_CrashError):
    _run(tmp_path, crash_at=3, host_state={"seen": [1]}, given=given)
  assert given == []
  _run(tmp_path, host_state={"seen": [1]}, given=given)
  assert given == [{"seen": [1]}]


def test_a_finished_run_does_nothing_when_run_again(tmp_path):
  first, _ = _run(tmp_path)
  logged = (tmp_path / "metrics.jsonl").read_text()
  again, done = _run(tmp_path)
  assert done == []
  assert _hash(again) == _hash(first)
  assert (tmp_path / "metrics.jsonl").read_text() == logged


def test_a_stop_request_at_the_last_step_finishes_normally(tmp_path):
  _, done = _run(tmp_path, stop_after=6)
  assert done[-1] == 5


def test_a_few_nonfinite_updates_are_skipped(tmp_path):
  final, done = _run(tmp_path, broken={1, 2, 4})
  assert done == list(range(6))
  assert int(final.num_nonfinite) == 0
  updated = [
    row["updated_fraction"] for row in _rows(tmp_path) if "loss" in row
  ]
  assert updated == [1.0, 0.0, 0.0, 1.0, 0.0, 1.0]


def test_skipped_updates_do_not_delay_the_schedule(tmp_path):
  final, _ = _run(tmp_path, broken={0, 1}, num_steps=3, save_every=3)
  rates = [row["learning_rate"] for row in _rows(tmp_path) if "loss" in row]
  np.testing.assert_allclose(rates, [0.1, 0.05, 0.1 / 3], rtol=1e-6)
  # The first of Adam's updates has the size of its learning rate.
  moved = np.abs(final.params["kernel"] - 1.0)
  np.testing.assert_allclose(moved, 0.1 / 3, rtol=1e-4)


def test_too_many_nonfinite_updates_raise_and_name_their_rows(tmp_path):
  with pytest.raises(errors.DivergedError, match="3 updates in a row"):
    _run(tmp_path, broken={2, 3, 4})
  assert _saved(tmp_path) == [2, 4]
  logged = json.loads((tmp_path / "nonfinite-5.json").read_text())["skipped"]
  rows = [(skipped["step"], *skipped["rows"]) for skipped in logged]
  assert rows == [(3, "row 2"), (4, "row 3"), (5, "row 4")]


def test_too_many_nonfinite_updates_at_the_last_step_raise(tmp_path):
  with pytest.raises(errors.DivergedError, match="3 updates in a row"):
    _run(tmp_path, broken={3, 4, 5})
  assert (tmp_path / "nonfinite-6.json").exists()
  assert 6 not in _saved(tmp_path)


def test_the_best_checkpoint_is_kept_and_loaded_at_the_end(tmp_path):
  kept = {"keep": 1, "best_metric": "eval/norm", "load_best": True}
  final, done = _run(tmp_path, eval_every=1, save_every=9, kept=kept)
  norms = [r["eval/norm"] for r in _rows(tmp_path) if "eval/norm" in r]
  best = 1 + norms.index(max(norms))
  assert len(done) == len(norms) == 6
  assert int(final.step) == best
  assert _saved(tmp_path) == sorted({best, 6})


def test_on_save_is_called_after_every_save(tmp_path):
  saved = []
  _run(tmp_path, on_save=lambda params, step: saved.append((step, set(params))))
  assert saved == [(step, {"kernel"}) for step in (2, 4, 6)]


def test_profile_steps_writes_a_trace(tmp_path):
  _run(tmp_path, profile_steps="2:3")
  (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
  assert trace.stat().st_size > 0


def test_a_crash_finishes_the_trace(tmp_path):
  with pytest.raises(_CrashError):
    _run(tmp_path, profile_steps="2:5", crash_at=3)
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("steps", ["0:1", "3:2", "5:7", "3", "a:b"])
def test_invalid_profile_steps_raise(tmp_path, steps):
  with pytest.raises(errors.ConfigError, match="profile_steps must be"):
    _run(tmp_path, profile_steps=steps)


@pytest.mark.parametrize("name", ["num_steps", "log_every", "save_every"])
def test_intervals_below_one_step_raise(tmp_path, name):
  with pytest.raises(errors.ConfigError, match=name):
    _run(tmp_path, **{name: 0})
