# SPDX-License-Identifier: Apache-2.0
"""Prints the results of runs as Markdown tables.

  python -m scripts.report results/sft
  python -m scripts.report results/eval_sft results/eval_grpo

A WORKDIR is that of any training or evaluation. Two evaluations of the same
questions are compared. The quickstart compares its teachers, one or more seeds
separated by commas, and plots training:

  python -m scripts.report --before=results/quickstart/eval_sft \
    --after=results/quickstart/eval_grpo --metrics=results/quickstart/grpo \
    --plot=results/quickstart/training.png
"""

from collections.abc import Mapping, Sequence
import itertools
import json
import pathlib
from typing import Any

from absl import flags
import matplotlib as mpl
import matplotlib.figure

from atlas_jax import errors, types
from atlas_jax.evaluation import evaluate, tables
from scripts import program

_BEFORE = flags.DEFINE_list("before", [], "Evaluations of the SFT teacher.")
_AFTER = flags.DEFINE_list("after", [], "Evaluations of the GRPO teacher.")
_METRICS = flags.DEFINE_list("metrics", [], "Workdirs of the GRPO runs.")
_PLOT = flags.DEFINE_string("plot", "", "A PNG of reward and accuracy.")

_RECORDS, _LOGGED = "records.jsonl", "metrics.jsonl"
# Of the metrics of a run, those whose course says most; see docs/metrics.md.
_MAIN = (
  "loss",
  "eval/loss",
  "token_accuracy",
  "reward",
  "reward_std",
  "accuracy",
  "eval/accuracy",
  "teaching/accuracy",
  "teaching/baseline_accuracy",
  "eval/teaching/accuracy",
  "eval/teaching/NDR",
  "kl",
  "grad_norm",
  "completion_length",
  "truncated_fraction",
  "step_s",
  "tokens_per_s",
  "mfu",
)


def main(workdirs: Sequence[str]) -> None:
  """Prints the tables and, with `--plot`, draws the plot."""
  if not workdirs and not _BEFORE.value:
    raise errors.ConfigError(
      "Nothing to report.",
      where="command line",
      why="It names no workdir.",
      fix="Write, for example, python -m scripts.report results/sft.",
    )
  print_runs([pathlib.Path(each) for each in workdirs])
  if _BEFORE.value:
    _print_quickstart()
  if _PLOT.value:
    _draw(pathlib.Path(_PLOT.value))


def print_runs(workdirs: Sequence[pathlib.Path]) -> None:
  """Prints each run, and the difference of consecutive evaluations.

  Raises:
    errors.AtlasError: if a folder is not a workdir, or has no results yet.
  """
  for workdir in workdirs:
    _print_run(workdir)
  evaluations = [w for w in workdirs if (w / _RECORDS).exists()]
  for before, after in itertools.pairwise(evaluations):
    difference = tables.gain(*map(_records, (before, after)))
    print(f"{after} minus {before}, accuracy on the {difference}")


def _print_run(workdir: pathlib.Path) -> None:
  """Prints the table of an evaluation, or the metrics of a training run."""
  print(f"\n{workdir}\n")
  if (workdir / _RECORDS).exists():
    records = _records(workdir)
    print(tables.of_evaluation(records))
    if accuracy := tables.echo_proof(records):
      print(f"\nEcho-proof accuracy: {accuracy}")
  elif (workdir / _LOGGED).exists():
    _print_training(workdir)
  else:
    raise errors.ConfigError(
      "The folder is not the workdir of a run.",
      where=str(workdir),
      why=f"It has neither {_LOGGED} nor {_RECORDS}.",
      fix="Use the --workdir of a training run or an evaluation.",
    )
  print()


def _print_training(workdir: pathlib.Path) -> None:
  rows = _logged(workdir)
  print("| metric | first | last | lowest | highest |")
  print("| --- | --- | --- | --- | --- |")
  for name in _MAIN:
    values = [row[name] for row in rows if isinstance(row.get(name), float)]
    if values:
      shown = (values[0], values[-1], min(values), max(values))
      print(f"| {name} | {' | '.join(f'{value:.4g}' for value in shown)} |")
  minutes = (rows[-1]["time"] - rows[0]["time"]) / 60
  export = workdir / "export"
  print(
    f"\nSteps {rows[0]['step']} to {rows[-1]['step']}, {minutes:.1f} minutes"
    " between them."
    + (f" The trained model: {export}" if export.exists() else "")
  )


def _print_quickstart() -> None:
  """Prints one table of all seeds, before and after GRPO."""
  if len(_BEFORE.value) != len(_AFTER.value):
    raise errors.ConfigError(
      "--before and --after must have the same length, got "
      f"{len(_BEFORE.value)} and {len(_AFTER.value)}.",
      where="--before, --after",
      why="Each seed has one evaluation before GRPO and one after it.",
      fix="Pass one of each per seed, in the same order.",
    )
  print(tables.header())
  pairs = []
  for i, folders in enumerate(zip(_BEFORE.value, _AFTER.value, strict=True)):
    before, after = (_records(pathlib.Path(folder)) for folder in folders)
    seed = f", seed {i}" if len(_BEFORE.value) > 1 else ""
    print(tables.alone(f"student alone{seed}", before))
    print(tables.taught(f"taught after SFT{seed}", before))
    print(tables.taught(f"taught after GRPO{seed}", after))
    pairs.append((before, after))
  print()
  for pair in pairs:
    print(f"GRPO minus SFT, taught accuracy on the {tables.gain(*pair)}")
  for pair in pairs:
    before, after = map(tables.echo_proof, pair)
    if before and after:
      print(f"Echo-proof accuracy: {before} after SFT, {after} after GRPO")


def _records(workdir: pathlib.Path) -> list[types.TeachingRecord]:
  return evaluate.read(workdir / _RECORDS)


def _logged(workdir: pathlib.Path) -> list[Mapping[str, Any]]:  # Any: JSON.
  text = (workdir / _LOGGED).read_text("utf-8")
  rows = [json.loads(line) for line in text.splitlines()]
  if not rows:
    raise errors.DataError(
      "The run has logged no step.",
      where=str(workdir / _LOGGED),
      why="The file is empty.",
      fix="Train for --config.loop.log_every steps or more.",
    )
  return rows


def _draw(path: pathlib.Path) -> None:
  """Plots reward and accuracies over the steps of each run."""
  mpl.rcParams["svg.hashsalt"] = "fixed"
  figure = matplotlib.figure.Figure(figsize=(9, 3.5), layout="constrained")
  left, right = figure.subplots(1, 2)
  for i, folder in enumerate(_METRICS.value):
    rows = _logged(pathlib.Path(folder))
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
  program.run(main, takes_words=True)
