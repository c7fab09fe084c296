# SPDX-License-Identifier: Apache-2.0
"""Markdown tables of evaluations, with 95 % intervals."""

from collections.abc import Mapping, Sequence

from atlas_jax import types
from atlas_jax.evaluation import metrics

_BOOTSTRAP = {"num_bootstrap": 2000, "seed": 0}
_COLUMNS = {
  "who answers": 24,
  "accuracy [95 %]": 20,
  "NDR [95 %]": 20,
  "leaks": 5,
  "no tag": 6,
  "tokens": 6,
  "TES": 6,
}


def header() -> str:
  """Returns the two lines above the rows."""
  return "\n".join(
    [_row(*_COLUMNS), _row(*("-" * width for width in _COLUMNS.values()))]
  )


def alone(name: str, records: Sequence[types.TeachingRecord]) -> str:
  """Returns the row of a student that answers without a teaching."""
  summary = metrics.summarize(records, **_BOOTSTRAP)
  return _row(name, with_interval(summary, "teaching/baseline_accuracy"))


def taught(name: str, records: Sequence[types.TeachingRecord]) -> str:
  """Returns the row of a student that answers with a teaching."""
  summary = metrics.summarize(records, **_BOOTSTRAP)
  efficiency = summary["teaching/TES"]
  return _row(
    name,
    with_interval(summary, "teaching/accuracy"),
    with_interval(summary, "teaching/NDR"),
    f"{summary['teaching/leak_rate']:.3f}",
    f"{summary['teaching/no_teaching_rate']:.3f}",
    f"{summary['teaching/num_teaching_tokens']:.1f}",
    # Undefined if no completion has a teaching.
    "" if efficiency is None else f"{efficiency:.1f}",
  )


def of_evaluation(records: Sequence[types.TeachingRecord]) -> str:
  """Returns the table of one evaluation; of a model alone, its accuracy."""
  if all(record.baseline for record in records):
    rows = [alone("student alone", records), taught("student taught", records)]
  else:
    summary = metrics.of_answers(records, **_BOOTSTRAP)
    rows = [_row("model", with_interval(summary, "accuracy"))]
  return "\n".join([header(), *rows])


def gain(
  before: Sequence[types.TeachingRecord], after: Sequence[types.TeachingRecord]
) -> str:
  """Returns the paired difference of two evaluations, and its size."""
  difference = metrics.compare(before, after, **_BOOTSTRAP)
  shown = with_interval(difference, "teaching/accuracy_difference", sign="+")
  return f"same {difference['teaching/num_questions']} questions: {shown}"


def echo_proof(records: Sequence[types.TeachingRecord]) -> str:
  """Returns the taught accuracy on paraphrases; "" without paraphrases."""
  if not any(record.paraphrased for record in records):
    return ""
  summary = metrics.summarize(records, **_BOOTSTRAP)
  return with_interval(summary, "teaching/echo_proof_accuracy")


def with_interval(
  summary: Mapping[str, float | metrics.Interval | None],
  name: str,
  *,
  sign: str = "",
) -> str:
  """Formats a metric as `0.570 [0.521, 0.618]`; "unknown" if undefined."""
  interval = summary[f"{name}_interval"]
  if not isinstance(interval, list):
    return "unknown"
  value, low, high = (f"{x:{sign}.3f}" for x in (summary[name], *interval))
  return f"{value} [{low}, {high}]"


def _row(*cells: str) -> str:
  widths = _COLUMNS.values()
  missing = [""] * (len(widths) - len(cells))
  padded = [
    cell.ljust(width)
    for cell, width in zip([*cells, *missing], widths, strict=True)
  ]
  return f"| {' | '.join(padded)} |"
