# SPDX-License-Identifier: Apache-2.0
"""Prints evaluation results as one table, and plots training runs.

  python -m scripts.report --before=results/quickstart/eval_sft \
    --after=results/quickstart/eval_grpo --metrics=results/quickstart/grpo \
    --plot=results/quickstart/training.png

With several directories, separated by commas, each pair is one seed with its
own rows. The table is Markdown.
"""

from collections.abc import Sequence
import json
import pathlib

from absl import flags
import matplotlib as mpl
import matplotlib.figure

from atlas_jax import errors, types
from atlas_jax.evaluation import evaluate, metrics
from scripts import program

_BEFORE = flags.DEFINE_list(
  "before", None, "Evaluations of the SFT teacher.", required=True
)
_AFTER = flags.DEFINE_list(
  "after", None, "Evaluations of the GRPO teacher.", required=True
)
_METRICS = flags.DEFINE_list("metrics", [], "Workdirs of the GRPO runs.")
_PLOT = flags.DEFINE_string("plot", "", "A PNG of reward and accuracy.")

_BOOTSTRAP = {"num_bootstrap": 2000, "seed": 0}
_COLUMNS = (
  "who answers",
  "accuracy [95 %]",
  "NDR [95 %]",
  "leaks",
  "no tag",
  "tokens",
  "TES",
)
_WIDTHS = (24, 20, 20, 5, 6, 6, 6)


def main() -> None:
  """Prints the table and, with `--plot`, draws the plot."""
  if len(_BEFORE.value) != len(_AFTER.value):
    raise errors.ConfigError(
      "--before and --after must have the same length, got "
      f"{len(_BEFORE.value)} and {len(_AFTER.value)}.",
      where="--before, --after",
      why="Each seed has one evaluation before GRPO and one after it.",
      fix="Pass one of each per seed, in the same order.",
    )
  print(_row(*_COLUMNS))
  print(_row(*("-" * width for width in _WIDTHS)))
  pairs = []
  for i, folders in enumerate(zip(_BEFORE.value, _AFTER.value, strict=True)):
    before, after = (
      evaluate.read(pathlib.Path(folder) / "records.jsonl")
      for folder in folders
    )
    seed = f", seed {i}" if len(_BEFORE.value) > 1 else ""
    print(_alone_row(f"student alone{seed}", before))
    print(_taught_row(f"taught after SFT{seed}", before))
    print(_taught_row(f"taught after GRPO{seed}", after))
    pairs.append((before, after))
  print()
  for pair in pairs:
    difference = metrics.compare(*pair, **_BOOTSTRAP)
    print(
      "GRPO minus SFT, taught accuracy on the same "
      f"{difference['teaching/num_questions']} questions: "
      + _with_interval(difference, "accuracy_difference", sign="+")
    )
  for before, after in pairs:
    _print_echo_proof(before, after)
  if _PLOT.value:
    _draw(pathlib.Path(_PLOT.value))


def _alone_row(name: str, records: Sequence[types.TeachingRecord]) -> str:
  summary = metrics.summarize(records, **_BOOTSTRAP)
  accuracy = _with_interval(summary, "baseline_accuracy")
  return _row(name, accuracy, "", "", "", "", "")


def _taught_row(name: str, records: Sequence[types.TeachingRecord]) -> str:
  summary = metrics.summarize(records, **_BOOTSTRAP)
  efficiency = summary["teaching/TES"]
  return _row(
    name,
    _with_interval(summary, "accuracy"),
    _with_interval(summary, "NDR"),
    f"{summary['teaching/leak_rate']:.3f}",
    f"{summary['teaching/no_teaching_rate']:.3f}",
    f"{summary['teaching/num_teaching_tokens']:.1f}",
    # Undefined if no completion has a teaching.
    "" if efficiency is None else f"{efficiency:.1f}",
  )


def _print_echo_proof(*evaluations: Sequence[types.TeachingRecord]) -> None:
  """Prints the taught accuracies on paraphrases, if the data has any."""
  if not all(any(r.paraphrased for r in records) for records in evaluations):
    return
  before, after = (
    _with_interval(
      metrics.summarize(records, **_BOOTSTRAP), "echo_proof_accuracy"
    )
    for records in evaluations
  )
  print(f"Echo-proof accuracy: {before} after SFT, {after} after GRPO")


def _row(*cells: str) -> str:
  padded = [c.ljust(width) for c, width in zip(cells, _WIDTHS, strict=True)]
  return f"| {' | '.join(padded)} |"


def _with_interval(
  summary: metrics.Summary, name: str, *, sign: str = ""
) -> str:
  interval = summary[f"teaching/{name}_interval"]
  if not isinstance(interval, list):
    return "unknown"
  numbers = (summary[f"teaching/{name}"], *interval)
  value, low, high = (f"{number:{sign}.3f}" for number in numbers)
  return f"{value} [{low}, {high}]"


def _draw(path: pathlib.Path) -> None:
  """Plots reward and accuracies over the steps of each run."""
  mpl.rcParams["svg.hashsalt"] = "fixed"
  figure = matplotlib.figure.Figure(figsize=(9, 3.5), layout="constrained")
  left, right = figure.subplots(1, 2)
  for i, folder in enumerate(_METRICS.value):
    file = pathlib.Path(folder) / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    train = [row for row in rows if "reward" in row]
    held_out = [row for row in rows if "eval/teaching/accuracy" in row]
    steps = [row["step"] for row in train]
    left.plot(steps, [row["reward"] for row in train], color=f"C{i}")
    for rows, prefix, style in ((train, "", "-"), (held_out, "eval/", "o")):
      right.plot(
        [row["step"] for row in rows],
        [row[f"{prefix}teaching/accuracy"] for row in rows],
        style,
        color=f"C{i}",
        label="taught" if style == "-" else "taught, held out",
      )
    right.plot(
      steps,
      [row["teaching/baseline_accuracy"] for row in train],
      ":",
      color=f"C{i}",
      label="student alone",
    )
  left.set(title="reward (R4)", xlabel="GRPO step")
  right.set(title="accuracy of the student", xlabel="GRPO step", ylim=(0, 1))
  handles, labels = right.get_legend_handles_labels()
  right.legend(handles[:3], labels[:3])
  figure.savefig(path, dpi=120)
  print(f"Plot: {path}")


if __name__ == "__main__":
  program.run(main)
