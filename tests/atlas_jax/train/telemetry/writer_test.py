# SPDX-License-Identifier: Apache-2.0
"""Every step is logged once, also after a crash and a resume."""

import json

from atlas_jax.train.telemetry import writer


class _Tracker:
  """Records its calls."""

  def __init__(self):
    self.calls = []

  def start(self):
    """Does nothing."""

  def scalars(self, *args):
    """Records metrics."""
    self.calls.append(args)

  table = scalars

  def close(self):
    """Records that it is closed."""
    self.calls.append("closed")


def _open(workdir, step=0, trackers=()):
  log = writer.Writer(workdir, trackers)
  log.begin(step=step, num_steps=10)
  return log


def _write(workdir, steps, *, start):
  log = _open(workdir, start)
  for step in steps:
    log.write(step, {"loss": float(step)})
  log.close()


def _rows(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_lines_of_repeated_steps_are_dropped(tmp_path):
  _write(tmp_path, [1, 2, 3, 4], start=0)
  _write(tmp_path, [3, 4, 5], start=2)
  assert [row["step"] for row in _rows(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_partial_last_line_is_dropped_and_a_missing_newline_added(tmp_path):
  path = tmp_path / "metrics.jsonl"
  _write(tmp_path, [1, 2], start=0)
  whole = path.read_text()
  for cut in (whole[:-1], whole + '{"step": 3, "lo'):
    path.write_text(cut)
    _write(tmp_path, [3], start=3)
    assert [row["step"] for row in _rows(tmp_path)] == [1, 2, 3]
    path.write_text(whole)


def test_nonfinite_metrics_are_null_and_not_sent_to_trackers(tmp_path):
  tracker = _Tracker()
  log = _open(tmp_path, trackers=[tracker])
  log.write(1, {"loss": float("nan"), "max": float("inf"), "ok": 2})
  log.close()
  (row,) = _rows(tmp_path)
  assert (row["loss"], row["max"], row["ok"]) == (None, None, 2.0)
  assert tracker.calls == [(1, {"ok": 2.0}), "closed"]


def test_a_repeated_step_replaces_its_table(tmp_path):
  tracker = _Tracker()
  log = _open(tmp_path, trackers=[tracker])
  path = tmp_path / "completions/step-3.jsonl"
  for text in ("first", "second"):
    rows = [{"text": text, "reward": 1.0}, {"text": "\u00e9", "reward": None}]
    log.table(3, "completions", rows, shown=["text"])
    lines = path.read_text("utf-8").splitlines()
    assert [json.loads(line)["text"] for line in lines] == [text, "\u00e9"]
    assert tracker.calls[-1][:2] == (3, "completions")
  assert [p.name for p in path.parent.iterdir()] == [path.name]
  log.close()


def test_last_returns_the_last_finite_value_with_its_step(tmp_path):
  assert writer.last(tmp_path) == {}
  log = _open(tmp_path)
  log.write(1, {"loss": 3.0, "eval/loss": 2.5, "step_s": 1.0})
  log.write(2, {"loss": 2.0})
  log.write(3, {"loss": float("nan")})
  log.close()
  assert writer.last(tmp_path) == {"loss": (2, 2.0), "eval/loss": (1, 2.5)}


def test_a_run_is_untrained_if_no_line_reports_an_update(tmp_path):
  assert not writer.is_untrained(tmp_path)
  log = _open(tmp_path)
  rate = {"learning_rate": 0.1}
  log.write(1, {"eval/loss": 2.5})
  assert not writer.is_untrained(tmp_path)
  log.write(1, {"loss": 0.0, "updated_fraction": 0.0, **rate})
  assert writer.is_untrained(tmp_path)
  log.write(2, {"loss": 0.0, "updated_fraction": 0.5, **rate})
  log.write(3, {"reward": 0.0, "updated_fraction": 0.0, **rate})
  log.close()
  assert not writer.is_untrained(tmp_path)
  # As written before that metric existed.
  for line, expected in (('"loss": 2.0', False), ('"reward": 0.0', True)):
    text = f'{{"step": 1, {line}, "learning_rate": 0.1}}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert writer.is_untrained(tmp_path) == expected
