# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a model on conversations.

  python -m scripts.train_sft --config=configs/run/teacher_sft.py:smoke \
    --workdir=results/sft

All state is in the workdir: the same command resumes a stopped run.
"""

import functools

from atlas_jax import distributed, sharding
from atlas_jax.data import loader, packing, sets
from atlas_jax.train import loop, sft
from scripts import program
from scripts.job import (
  arguments,
  components,
  config_help,
  exports,
  outcome,
  print_config,
  processes,
  show_samples,
)
from scripts.plan import report

_HELP = config_help.ConfigHelp(
  "teacher_sft.py",
  (
    "model.path",
    "data.path",
    "num_epochs",
    "schedule.learning_rate",
    "batch.size",
    "batch.per_device",
    "packing.length",
    "lora.rank",
    "held_out.fraction",
    "report.to",
  ),
)


def main() -> None:
  """Runs one training job to its end."""
  if (
    print_config.print_if_requested("sft")
    or show_samples.print_if_requested("sft")
    or report.print_plan("sft")
  ):
    return
  config, workdir = arguments.parse("sft")
  with components.start(workdir, config) as should_stop:
    writer = components.open_writer(workdir, config)
    mesh = sharding.make_mesh(**config.mesh)
    sharding.num_microbatches(mesh, **config.batch)  # Fails early.
    sharding.check_length(
      mesh, config.packing.length, where="--config.packing.length"
    )
    base = components.open_model(mesh, **config.model)
    length = packing.row_length(
      config.packing.length, base.model.config.max_positions
    )
    sharding.check_length(mesh, length, where="--config.packing.length")
    policy, params = components.open_policy(
      base, mesh, seed=config.seed, **config.lora
    )
    train_set, eval_set = sets.conversations(
      base.tokenizer,
      data=sets.Selection(**config.data),
      held_out=sets.HeldOut(**config.held_out),
      layout=sets.Layout(**{**config.packing, "length": length}),
      batch_size=config.batch.size,
      share=loader.Share(*sharding.share_of_rows(mesh)),
      seed=config.seed,
      workdir=workdir,
    )
    distributed.agree(
      {"data": train_set.fingerprint(), "held out": eval_set.fingerprint()}
    )
    export = exports.writer(
      workdir,
      base,
      policy,
      config,
      facts={
        "Recipe": "SFT",
        "Data": config.data.path,
        "Data fingerprint": train_set.fingerprint(),
      },
    )
    params = sft.train(
      policy,
      params,
      train_set=train_set,
      eval_set=eval_set,
      mesh=mesh,
      config=config,
      run=loop.Run(workdir, writer, export, should_stop),
    )
    export(params, None)
    outcome.report(workdir, config)


if __name__ == "__main__":
  program.run(
    functools.partial(processes.run, "Training", "scripts.train_sft", main),
    config_help=_HELP,
  )
