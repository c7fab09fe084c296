# SPDX-License-Identifier: Apache-2.0
"""Tests the table of the quickstart."""

from atlas_jax import types
from scripts import report


def _record(teaching):
  attempt = types.Attempt("", 1, "stop", correct=True)
  completion = types.Completion((1,), (0.0,), (0.0,), "stop", 0)
  return types.TeachingRecord(
    question=types.Question("q", "1 + 1", "2"),
    probe="",
    teacher_rollout=types.Rollout(types.Prompt("q", "", (1,)), completion),
    teaching=teaching,
    num_teaching_tokens=4 if teaching else 0,
    baseline=(attempt,),
    taught=(attempt,),
    leaked=False,
  )


def _efficiency(teaching):
  return (
    report._taught_row("taught", [_record(teaching)]).split("|")[-2].strip()
  )


def test_a_teacher_without_teachings_has_no_efficiency():
  assert _efficiency(None) == ""
  assert _efficiency("Add.") == "0.0"
