# SPDX-License-Identifier: Apache-2.0
"""Tests metrics against their definitions on hand-written records."""

import dataclasses
import json
import math

import numpy as np
import pytest

from atlas_jax import types
from atlas_jax.evaluation import metrics

_SETTINGS = {"num_bootstrap": 200, "seed": 0}


def _record(
  row_id,
  baseline,
  taught,
  *,
  teaching="hint",
  num_teaching_tokens=50,
  finish_reason="stop",
  leaked=False,
  difficulty="",
):
  completion = types.Completion((), (), (), "stop", 0)
  return types.TeachingRecord(
    question=types.Question(row_id, "?", "1", difficulty),
    probe="",
    teacher_rollout=types.Rollout(types.Prompt("", "", ()), completion),
    teaching=teaching,
    num_teaching_tokens=num_teaching_tokens,
    baseline=tuple(types.Attempt("", 8, "stop", bool(b)) for b in baseline),
    taught=tuple(types.Attempt("", 6, finish_reason, bool(t)) for t in taught),
    leaked=leaked,
    seconds=0.5,
  )


def _records():
  """Returns improved, degraded, improved and unchanged: gain 1/4."""
  return [
    _record("a", [0], [1], leaked=True),
    _record("b", [1], [0], finish_reason="length"),
    _record("c", [0], [1], num_teaching_tokens=150),
    _record("d", [1], [1], teaching=None, num_teaching_tokens=0),
  ]


def test_summary_follows_the_definitions():
  summary = metrics.summarize(_records(), **_SETTINGS)
  expected = {
    "num_questions": 4,
    "seconds": 2.0,
    "accuracy": 0.75,
    "baseline_accuracy": 0.5,
    "APG": 0.25,
    "NDR": 0.75,
    "completion_rate": 0.75,
    "leak_rate": 0.25,
    "no_teaching_rate": 0.25,
    "num_teaching_tokens": 62.5,
    "num_baseline_tokens": 8.0,
    "num_taught_tokens": 6.0,
    "TES": 0.25 * 0.75 / 0.0625,
    "LR": 0.25,
  }
  for name, value in expected.items():
    assert summary[f"teaching/{name}"] == pytest.approx(value), name
  json.dumps(summary, allow_nan=False)


def test_every_interval_contains_its_value():
  summary = metrics.summarize(_records(), **_SETTINGS)
  for key in summary:
    if key.endswith("_interval"):
      low, high = summary[key]
      assert low <= summary[key.removesuffix("_interval")] <= high, key


def test_the_gain_is_shared_among_several_teachings_of_a_question():
  records = [
    _record("a", [0, 1], [1]),
    _record("a", [0, 1], [1]),
    _record("b", [0, 0], [1]),
    _record("b", [0, 0], [0]),
  ]
  summary = metrics.summarize(records, **_SETTINGS)
  assert summary["teaching/num_questions"] == 2
  assert summary["teaching/APG"] == pytest.approx(0.5)
  assert summary["teaching/LR"] == pytest.approx(0.25)


def test_non_degradation_rate_is_the_share_of_pairs_of_answers():
  records = [_record("a", [0, 1], [0]), _record("b", [1, 1, 0], [0, 1])]
  summary = metrics.summarize(records, **_SETTINGS)
  assert summary["teaching/NDR"] == pytest.approx((1 / 2 + 4 / 6) / 2)


@pytest.mark.parametrize(
  ("baseline", "taught", "expected"),
  # The first two teachings have no effect.
  [(0.5, 0.5, 0.75), (0.9, 0.9, 0.91), (0.4, 0.8, 0.92)],
)
@pytest.mark.parametrize(
  ("num_baselines", "num_teachings", "num_answers"),
  [(1, 1, 1), (4, 1, 1), (1, 4, 1), (8, 2, 3)],
)
def test_non_degradation_rate_does_not_depend_on_numbers_of_answers(
  baseline, taught, expected, num_baselines, num_teachings, num_answers
):
  rng = np.random.default_rng(0)
  records = []
  for i in range(2000):
    drawn = rng.random(num_baselines) < baseline
    records += [
      _record(str(i), drawn, rng.random(num_answers) < taught)
      for _ in range(num_teachings)
    ]
  summary = metrics.summarize(records, num_bootstrap=0, seed=0)
  # At most four standard errors of a share of 2000.
  assert summary["teaching/NDR"] == pytest.approx(expected, abs=0.039)


def test_echo_proof_accuracy_is_over_questions_with_a_paraphrase():
  records = [*_records(), _record("d", [1], [1])]
  summary = metrics.summarize(records, **_SETTINGS)
  assert not [name for name in summary if "echo" in name or "phrase" in name]
  answers = {0: [1], 3: [0, 0], 4: [1, 0]}  # Records of "a", "d" and "d".
  for i, correct in answers.items():
    attempts = tuple(types.Attempt("", 6, "stop", bool(c)) for c in correct)
    records[i] = dataclasses.replace(records[i], paraphrased=attempts)
  summary = metrics.summarize(records, **_SETTINGS)
  assert summary["teaching/num_paraphrases"] == 2
  assert summary["teaching/echo_proof_accuracy"] == (1 + (0 + 0.5) / 2) / 2
  assert summary["teaching/echo_proof_accuracy_interval"] == metrics.wilson(
    0.625, 2
  )


def test_the_order_of_records_changes_no_metric():
  records = _records()
  forth = metrics.summarize(records, **_SETTINGS)
  back = metrics.summarize(records[::-1], **_SETTINGS)
  for key in forth:
    if not key.endswith("_interval"):
      assert forth[key] == pytest.approx(back[key])


def test_efficiency_is_undefined_without_teaching():
  record = _record("a", [1], [1], teaching=None, num_teaching_tokens=0)
  summary = metrics.summarize([record], **_SETTINGS)
  assert summary["teaching/TES"] is None
  assert summary["teaching/TES_interval"] is None


def test_wilson_matches_published_values():
  # Newcombe (1998), Statistics in Medicine 17:857-872, table I.
  for right, trials, low, high in [
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0, 0.1611),
    (1, 29, 0.0061, 0.1718),
  ]:
    interval = metrics.wilson(right / trials, trials)
    np.testing.assert_allclose(interval, [low, high], atol=5e-5)
  assert metrics.wilson(1.0, 10)[1] == 1.0


def test_bootstrap_is_seeded_and_matches_the_normal_interval():
  rng = np.random.default_rng(3)
  columns = {"x": rng.normal(size=400)}

  def interval(seed):
    return metrics.bootstrap(
      columns, lambda means: means["x"], num_bootstrap=2000, seed=seed
    )

  assert interval(1) == interval(1)
  assert interval(1) != interval(2)
  spread = 1.96 * columns["x"].std() / math.sqrt(400)
  mean = columns["x"].mean()
  np.testing.assert_allclose(
    interval(1), [mean - spread, mean + spread], atol=0.015
  )


def test_pairing_narrows_the_interval_of_a_comparison():
  rng = np.random.default_rng(0)
  right = rng.random(100) < 0.5
  records_a = [_record(str(i), [0], [r]) for i, r in enumerate(right)]
  # b is correct wherever a is, and on five more questions.
  more = set(np.flatnonzero(~right)[:5])
  records_b = [
    _record(str(i), [0], [r or i in more]) for i, r in enumerate(right)
  ]
  compared = metrics.compare(records_a, records_b[::-1], **_SETTINGS)
  assert compared["teaching/num_questions"] == 100
  assert compared["teaching/accuracy_difference"] == pytest.approx(0.05)
  low, high = compared["teaching/accuracy_difference_interval"]
  assert 0.0 < low <= 0.05 <= high < 0.12


def test_compare_rejects_other_questions():
  with pytest.raises(ValueError, match="'b'"):
    metrics.compare(
      [_record("a", [0], [1])],
      [_record("a", [0], [1]), _record("b", [0], [1])],
      **_SETTINGS,
    )


def test_difficulties_are_summarized_separately():
  records = [
    _record("a", [0], [1], difficulty="hard"),
    _record("b", [1], [1], difficulty="easy"),
  ]
  summaries = metrics.by_difficulty(records, **_SETTINGS)
  assert list(summaries) == ["easy", "hard"]
  assert summaries["hard"]["teaching/APG"] == 1.0
  assert summaries["easy"]["teaching/APG"] == 0.0


def test_ungraded_or_no_records_are_rejected():
  with pytest.raises(ValueError, match="not graded"):
    metrics.summarize([_record("a", [0], [1], leaked=None)], **_SETTINGS)
  with pytest.raises(ValueError, match="at least one"):
    metrics.summarize([], **_SETTINGS)
