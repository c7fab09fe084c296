# SPDX-License-Identifier: Apache-2.0
"""Metrics of graded records: the student with and without a teaching.

The ATLAS documents name these metrics without units, and without a formula for
APG and LR; this module defines them. Let t and b be the shares of correct
answers to a question with and without a teaching; means are over questions:

  APG (performance gain)      mean(t - b)
  NDR (non-degradation rate)  mean(1 - (1 - t) b)
  TES (teaching efficiency)   APG * completion rate
                              / (mean teaching tokens / 1000)
  LR  (gain per interaction)  APG / teachings per question
  echo-proof accuracy         mean(p), over questions with a paraphrase, where p
                              is the share of correct answers to it with the
                              teachings of the question

Gains are fractions, not percentage points. The completion rate is the share of
taught answers that finish within the token limit.

NDR is the probability that a taught and a baseline answer, drawn independently,
are not wrong and right, in this order. t and b are independent and unbiased, so
the expectation of the estimate is the same for any number of samples. The
original is the share of items with t - b >= 0, from one answer of each kind,
which has the same expectation; with b the mean of several answers it would be a
stricter criterion. A teaching without effect on a question that the student
answers correctly with probability q has an NDR of 1 - q (1 - q), at least 0.75,
and of 1 if the student is always right or always wrong.

Sources: the README of ATLAS (APG, NDR), docs/benchmarks/evaluation-
methodology.mdx (NDR, TES), its glossary (LR).

All questions have the same weight. Intervals are over questions, since answers
to one question are not independent.
"""

from collections.abc import Callable, Mapping, Sequence
import math
import statistics

import numpy as np

from atlas_jax import types

Interval = list[float]
Summary = dict[str, float | Interval | None]

_Z = statistics.NormalDist().inv_cdf(0.975)

# Columns of `_per_question` that are shares, and get Wilson intervals.
_SHARES = (
  "accuracy",
  "baseline_accuracy",
  "NDR",
  "completion_rate",
  "leak_rate",
  "no_teaching_rate",
)
_MEANS = ("num_teaching_tokens", "num_baseline_tokens", "num_taught_tokens")


def summarize(
  records: Sequence[types.TeachingRecord], *, num_bootstrap: int, seed: int
) -> Summary:
  """Computes all metrics with 95 % intervals.

  Keys have the form `teaching/NDR`; `teaching/accuracy` is that of the taught
  answers. `..._interval` holds [low, high]: Wilson's interval for shares, since
  a bootstrap interval has width 0 at shares of 0 and 1, and the bootstrap over
  questions for APG, TES and LR.

  Args:
    records: graded, at least one.
    num_bootstrap: number of resamples; 0 disables bootstrap intervals.
    seed: of the resamples.

  Returns:
    The metrics. TES is None if there are no teachings; its interval is None if
    a resample has none. If there are answers to paraphrases,
    `teaching/echo_proof_accuracy` is their accuracy and
    `teaching/num_paraphrases` the number of questions with one.

  Raises:
    ValueError: if there are no records, or some are not graded.
  """
  columns = _per_question(records)
  num_questions = len(columns["accuracy"])
  per_question = len(records) / num_questions
  means = {name: float(values.mean()) for name, values in columns.items()}
  summary: Summary = {
    "teaching/num_questions": num_questions,
    "teaching/seconds": sum(record.seconds for record in records),
  }
  for name in _SHARES:
    summary[f"teaching/{name}"] = means[name]
    summary[f"teaching/{name}_interval"] = wilson(means[name], num_questions)
  for name in _MEANS:
    summary[f"teaching/{name}"] = means[name]
  summary |= _echo_proof(records)
  statistic: dict[str, Callable[[Mapping[str, float]], float]] = {
    "APG": performance_gain,
    "TES": teaching_efficiency,
    "LR": lambda means: performance_gain(means) / per_question,
  }
  for name, function in statistic.items():
    value = function(means)
    summary[f"teaching/{name}"] = value if math.isfinite(value) else None
    summary[f"teaching/{name}_interval"] = bootstrap(
      columns, function, num_bootstrap=num_bootstrap, seed=seed
    )
  return summary


def of_answers(
  records: Sequence[types.TeachingRecord], *, num_bootstrap: int, seed: int
) -> Summary:
  """Computes `summarize` if there are baselines, else only the accuracy.

  Without baselines the result is `accuracy` and `accuracy_interval`. Records
  without an answer are left out; if none is left, the result is empty.
  """
  answered = [record for record in records if record.taught]
  compared = [record for record in answered if record.baseline]
  if compared:
    return summarize(compared, num_bootstrap=num_bootstrap, seed=seed)
  if not answered:
    return {}
  columns: dict[str, list[float]] = {}
  for record in answered:
    columns.setdefault(record.question.row_id, []).extend(
      float(bool(attempt.correct)) for attempt in record.taught
    )
  accuracy = float(np.mean([np.mean(each) for each in columns.values()]))
  return {
    "accuracy": accuracy,
    "accuracy_interval": wilson(accuracy, len(columns)),
  }


def by_difficulty(
  records: Sequence[types.TeachingRecord], *, num_bootstrap: int, seed: int
) -> dict[str, Summary]:
  """Summarizes the records of each difficulty, in alphabetical order."""
  difficulties = sorted({record.question.difficulty for record in records})
  return {
    difficulty: of_answers(
      [r for r in records if r.question.difficulty == difficulty],
      num_bootstrap=num_bootstrap,
      seed=seed,
    )
    for difficulty in difficulties
  }


def compare(
  records_a: Sequence[types.TeachingRecord],
  records_b: Sequence[types.TeachingRecord],
  *,
  num_bootstrap: int,
  seed: int,
) -> Summary:
  """Computes a paired comparison of two teachers on the same questions.

  Returns:
    `teaching/accuracy_difference`, the taught accuracy of b minus that of a,
    its 95 % bootstrap interval, and the number of questions.

  Raises:
    ValueError: if the two cover different questions.
  """
  groups_a, groups_b = _groups(records_a), _groups(records_b)
  if groups_a.keys() != groups_b.keys():
    odd = sorted(groups_a.keys() ^ groups_b.keys())
    raise ValueError(
      f"Both sides must have the same questions; {len(odd)} are on one side "
      f"only, e.g. {odd[0]!r}."
    )
  difference = np.array(
    [
      np.mean([_accuracy(r.taught) for r in groups_b[row_id]])
      - np.mean([_accuracy(r.taught) for r in groups_a[row_id]])
      for row_id in groups_a
    ]
  )
  return {
    "teaching/num_questions": len(difference),
    "teaching/accuracy_difference": float(difference.mean()),
    "teaching/accuracy_difference_interval": bootstrap(
      {"difference": difference},
      lambda means: means["difference"],
      num_bootstrap=num_bootstrap,
      seed=seed,
    ),
  }


def performance_gain(means: Mapping[str, float]) -> float:
  """Computes APG from means over questions."""
  return means["accuracy"] - means["baseline_accuracy"]


def teaching_efficiency(means: Mapping[str, float]) -> float:
  """Computes TES, gain per thousand teaching tokens; NaN for 0 tokens."""
  if means["num_teaching_tokens"] == 0:
    return math.nan
  gain = performance_gain(means) * means["completion_rate"]
  return gain / (means["num_teaching_tokens"] / 1000)


def wilson(share: float, num_trials: int) -> Interval:
  """Computes the 95 % Wilson score interval of a share.

  If a trial is the mean over several answers to one question, the interval is
  conservative (too wide).

  Source: Wilson (1927), JASA 22:209-212.
  """
  center = share + _Z**2 / (2 * num_trials)
  spread = _Z * math.sqrt(
    share * (1 - share) / num_trials + _Z**2 / (4 * num_trials**2)
  )
  scale = 1 + _Z**2 / num_trials
  # Clamped, so rounding cannot leave [0, 1] or exclude the share.
  low = min(max((center - spread) / scale, 0.0), share)
  return [low, max(min((center + spread) / scale, 1.0), share)]


def bootstrap(
  columns: Mapping[str, np.ndarray],
  statistic: Callable[[Mapping[str, float]], float],
  *,
  num_bootstrap: int,
  seed: int,
) -> Interval | None:
  """Computes the 95 % percentile interval of a statistic of column means.

  Whole rows, one per question, are drawn with replacement, so columns stay
  paired.

  Returns:
    [low, high], or None if there are no resamples or the statistic is not
    finite for one of them.
  """
  rng = np.random.default_rng(seed)
  table = np.stack(list(columns.values()), axis=1)
  values = []
  for _ in range(num_bootstrap):
    means = table[rng.integers(len(table), size=len(table))].mean(axis=0)
    values.append(statistic(dict(zip(columns, means.tolist(), strict=True))))
  if not values or not np.isfinite(values).all():
    return None
  return np.quantile(values, [0.025, 0.975]).tolist()


def _per_question(
  records: Sequence[types.TeachingRecord],
) -> dict[str, np.ndarray]:
  """Averages the measures of each question's records."""
  if not records:
    raise ValueError("Expected at least one record, got 0.")
  groups = [
    [_measures(record) for record in group]
    for group in _groups(records).values()
  ]
  return {
    name: np.array([np.mean([m[name] for m in group]) for group in groups])
    for name in groups[0][0]
  }


def _echo_proof(records: Sequence[types.TeachingRecord]) -> Summary:
  """Computes the accuracy on paraphrases; empty without paraphrases."""
  groups = _groups([record for record in records if record.paraphrased])
  if not groups:
    return {}
  accuracy = statistics.fmean(
    statistics.fmean(_accuracy(record.paraphrased) for record in group)
    for group in groups.values()
  )
  return {
    "teaching/num_paraphrases": len(groups),
    "teaching/echo_proof_accuracy": accuracy,
    "teaching/echo_proof_accuracy_interval": wilson(accuracy, len(groups)),
  }


def _groups(
  records: Sequence[types.TeachingRecord],
) -> dict[str, list[types.TeachingRecord]]:
  """Groups records by question, in order of appearance."""
  groups: dict[str, list[types.TeachingRecord]] = {}
  for record in records:
    groups.setdefault(record.question.row_id, []).append(record)
  return groups


def _measures(record: types.TeachingRecord) -> dict[str, float]:
  """Computes the measures of one graded record."""
  if record.leaked is None:
    raise ValueError(f"Record {record.question.row_id!r} is not graded.")
  taught, baseline = _accuracy(record.taught), _accuracy(record.baseline)
  finished = [attempt.finish_reason == "stop" for attempt in record.taught]
  return {
    "accuracy": taught,
    "baseline_accuracy": baseline,
    "NDR": 1.0 - (1.0 - taught) * baseline,
    "completion_rate": statistics.fmean(finished),
    "leak_rate": float(record.leaked),
    "no_teaching_rate": float(record.teaching is None),
    "num_teaching_tokens": record.num_teaching_tokens,
    "num_baseline_tokens": _mean_tokens(record.baseline),
    "num_taught_tokens": _mean_tokens(record.taught),
  }


def _accuracy(attempts: Sequence[types.Attempt]) -> float:
  """Returns the share of correct answers."""
  correct = [a.correct for a in attempts if a.correct is not None]
  if not attempts or len(correct) < len(attempts):
    raise ValueError("Expected graded answers, at least one per record.")
  return statistics.fmean(correct)


def _mean_tokens(attempts: Sequence[types.Attempt]) -> float:
  return statistics.fmean(attempt.num_tokens for attempt in attempts)
