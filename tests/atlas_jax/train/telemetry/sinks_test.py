# SPDX-License-Identifier: Apache-2.0
"""A failing or blocking tracker costs one warning, and never the run."""

import errno
import logging
import sys
import threading
import time

import pytest

from atlas_jax import errors
from atlas_jax.train.telemetry import sinks


class _Sink:
  """Records its calls; can raise or block."""

  def __init__(self, do=lambda: None):
    self.calls, self.closed, self._do = [], False, do

  def scalars(self, *args):
    """Records metrics."""
    self._do()
    self.calls.append(args)

  table = scalars

  def close(self):
    """Records that it is closed."""
    self.closed = True


def _start(opener):
  tracker = sinks.Background("fake", opener)
  tracker.start()
  return tracker


def _open(tmp_path, to):
  settings = {"project": "p", "group": "", "name": ""}
  return sinks.open_sinks(tmp_path, {"seed": 1}, to=to, **settings)


def test_everything_arrives_in_order(caplog):
  sink = _Sink()
  tracker = _start(lambda: sink)
  for step in range(5):
    tracker.scalars(step, {"loss": 1.0})
  tracker.table(5, "completions", [{"text": "a"}])
  tracker.close()
  assert [step for step, *_ in sink.calls] == list(range(6))
  assert sink.closed
  assert not caplog.records


@pytest.mark.parametrize("error", [ValueError, KeyError, SystemExit])
def test_an_exception_is_logged_once_and_without_its_message(caplog, error):
  def fail():
    raise error("https://user:secret@host")

  tracker = _start(lambda: _Sink(fail))
  for step in range(3):
    tracker.scalars(step, {"loss": 1.0})
  tracker.close()
  (record,) = caplog.records
  assert record.levelno == logging.WARNING
  assert error.__name__ in record.getMessage()
  assert "secret" not in caplog.text


def test_a_tracker_that_cannot_be_opened_costs_a_warning(caplog):
  def fail():
    raise OSError(errno.ENOSPC, "https://user:secret@host")

  tracker = _start(fail)
  tracker.scalars(1, {"loss": 1.0})
  tracker.close()
  (record,) = caplog.records
  text = "OSError (errno 28, No space left on device) while opening"
  assert text in record.getMessage()
  assert "secret" not in caplog.text


def test_a_blocking_tracker_does_not_slow_the_run(caplog):
  released = threading.Event()
  tracker = _start(lambda: _Sink(lambda: released.wait(60)))
  started = time.monotonic()
  for step in range(2000):
    tracker.scalars(step, {"loss": 1.0})
  tracker.close(max_wait_s=0.05)
  assert time.monotonic() - started < 5.0
  released.set()
  assert len(caplog.records) == 1


def test_none_opens_no_tracker(tmp_path):
  assert _open(tmp_path, "none") == []


def test_an_unknown_tracker_is_rejected(tmp_path):
  with pytest.raises(errors.ConfigError, match="tensorboard, wandb, trackio"):
    _open(tmp_path, "tensorbord")


def test_a_missing_package_is_reported_with_its_install_command(
  tmp_path, monkeypatch
):
  monkeypatch.setitem(sys.modules, "wandb", None)
  monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda _: None)
  with pytest.raises(errors.ConfigError, match="pip install wandb"):
    _open(tmp_path, "wandb")


def test_tensorboard_files_contain_metrics_and_tables(tmp_path):
  (tracker,) = _open(tmp_path, "tensorboard")
  tracker.start()
  tracker.scalars(3, {"teaching/NDR": 0.75})
  tracker.table(3, "completions", [{"teaching": "a|b", "reward": 0.5}])
  tracker.close()
  (path,) = (tmp_path / "tensorboard").iterdir()
  written = path.read_bytes()
  assert b"teaching/NDR" in written
  assert b'    {\n      "seed": 1\n    }' in written  # The config.
  assert b"| a\\|b | 0.5 |" in written
