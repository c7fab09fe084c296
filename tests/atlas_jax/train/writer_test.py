# SPDX-License-Identifier: Apache-2.0
"""Every step is told once, whatever happened in between."""

import json

from atlas_jax.train import writer


def _write(path, steps, *, start):
  log = writer.Writer(path, step=start, num_steps=10)
  for step in steps:
    log.write(step, {"loss": float(step)})
  log.close()


def _rows(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_of_steps_done_again_are_dropped(tmp_path):
  path = tmp_path / "metrics.jsonl"
  _write(path, [1, 2, 3, 4], start=0)
  _write(path, [3, 4, 5], start=2)
  assert [row["step"] for row in _rows(path)] == [1, 2, 3, 4, 5]


def test_a_torn_last_line_is_dropped_and_a_lost_newline_restored(tmp_path):
  path = tmp_path / "metrics.jsonl"
  _write(path, [1, 2], start=0)
  whole = path.read_text()
  for cut in (whole[:-1], whole + '{"step": 3, "lo'):
    path.write_text(cut)
    _write(path, [3], start=3)
    assert [row["step"] for row in _rows(path)] == [1, 2, 3]
    path.write_text(whole)


def test_what_is_not_finite_is_null(tmp_path):
  path = tmp_path / "metrics.jsonl"
  log = writer.Writer(path, step=0, num_steps=1)
  log.write(1, {"loss": float("nan"), "max": float("inf"), "ok": 2})
  log.close()
  (row,) = _rows(path)
  assert (row["loss"], row["max"], row["ok"]) == (None, None, 2.0)
