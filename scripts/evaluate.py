# SPDX-License-Identifier: Apache-2.0
"""Evaluates a teacher, or a model that answers by itself.

  python -m scripts.evaluate --config=configs/run/teaching_eval.py:smoke \
    --workdir=results/eval --config.model.path=results/grpo/export

`teaching_eval` compares the student alone with the taught student;
`answer_eval` needs no student. Prints a table, and writes `records.jsonl`, one
line per question, and `summary.json`, with 95 % intervals. Run again after an
interruption, it continues from the records.
"""

from collections.abc import Iterator
import contextlib
import functools
import json

import jax

from atlas_jax import distributed, sharding, types
from atlas_jax.data import sets
from atlas_jax.evaluation import evaluate, metrics, tables
from atlas_jax.teaching import protocol, single_model
from conversion import load
from scripts import program
from scripts.job import (
  arguments,
  components,
  config_help,
  print_config,
  processes,
  show_samples,
)

_HELP = config_help.ConfigHelp(
  "teaching_eval.py",
  (
    "model.path",
    "student.path",
    "data.path",
    "data.max_rows",
    "sampling.teach.max_completion_tokens",
    "sampling.solve.max_completion_tokens",
    "sampling.solve.temperature",
    "batch_size",
    "sampler.max_rows",
    "rollout.backend",
  ),
)


def main() -> None:
  """Answers every question, then prints and saves metrics."""
  if print_config.print_if_requested(
    "evaluation"
  ) or show_samples.print_if_requested("evaluation"):
    return
  config, workdir = arguments.parse("evaluation")
  from_first = distributed.FirstProcessBroadcast("evaluation")
  with components.start(workdir, config) as should_stop:
    mesh = sharding.make_mesh(**config.mesh)
    data = sets.Selection(**config.data)
    questions = sets.all_questions(data, workdir=workdir)
    with (
      _open_rollouts(mesh, config) as (rollouts, models),
      components.open_grader(config.math_verify) as grader,
    ):
      # Training pushes weights at every step; here nothing else does.
      if config.rollout.backend == "http":
        rollouts.policy.sampler.update_weights(models["policy"].params, 0)
      records = evaluate.run(
        rollouts,
        questions,
        grader=grader,
        batch_size=config.batch_size,
        # The baselines have the seed `config.seed`.
        seed=config.seed + 1,
        weights={
          name: from_first(
            functools.partial(load.fingerprint, opened.directory)
          )
          for name, opened in models.items()
        },
        path=workdir / "records.jsonl",
        should_stop=should_stop,
        from_first=from_first,
      )
    if not distributed.is_first():
      return
    bootstrap = {"num_bootstrap": config.num_bootstrap, "seed": config.seed}
    summary = {
      "all": metrics.of_answers(records, **bootstrap),
      **metrics.by_difficulty(records, **bootstrap),
    }
    text = json.dumps(summary, indent=2)
    (workdir / "summary.json").write_text(text + "\n", encoding="utf-8")
    print(tables.of_evaluation(records))
    if accuracy := tables.echo_proof(records):
      print(f"\nEcho-proof accuracy: {accuracy}")
    print(f"\nAll metrics: {workdir / 'summary.json'}")


@contextlib.contextmanager
def _open_rollouts(
  mesh: jax.sharding.Mesh, config: types.Config
) -> Iterator[
  tuple[
    protocol.Protocol | single_model.SingleModelRollouts,
    dict[str, components.OpenModel],
  ]
]:
  """Opens the rollouts, with or without a student, and their models."""
  models = {"policy": components.open_model(mesh, **config.model)}
  if "student" not in config:
    with components.open_single_model(
      models["policy"], mesh, config
    ) as rollouts:
      yield rollouts, models
    return
  models["student"] = components.open_model(
    mesh, **config.student, with_params=config.rollout.backend == "jax"
  )
  with components.open_protocol(
    models["policy"], models["student"], mesh, config
  ) as rollouts:
    yield rollouts, models


if __name__ == "__main__":
  program.run(
    functools.partial(processes.run, "Evaluation", "scripts.evaluate", main),
    config_help=_HELP,
  )
