# SPDX-License-Identifier: Apache-2.0
"""Distills a teacher into a policy by GKD.

  python -m scripts.train_gkd --config=configs/run/teacher_gkd.py:smoke \
    --workdir=results/gkd

All state is in the workdir: the same command resumes a stopped run.
"""

import contextlib
import functools

from atlas_jax import distributed, sharding
from atlas_jax.data import packing, sets
from atlas_jax.train import gkd, gkd_batches, loop
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
  "teacher_gkd.py",
  (
    "model.path",
    "teacher.path",
    "data.path",
    "num_epochs",
    "schedule.learning_rate",
    "batch.num_prompts",
    "sampling.complete.max_completion_tokens",
    "completions.on_policy_fraction",
    "loss.beta",
    "lora.rank",
  ),
)


def main() -> None:
  """Runs one training job to its end."""
  if (
    print_config.print_if_requested("gkd")
    or show_samples.print_if_requested("gkd")
    or report.print_plan("gkd")
  ):
    return
  config, workdir = arguments.parse("gkd")
  with (
    components.start(workdir, config) as should_stop,
    contextlib.ExitStack() as opened,
  ):
    writer = components.open_writer(workdir, config)
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_length(
      mesh, config.packing.length, where="--config.packing.length"
    )
    base = components.open_model(mesh, **config.model)
    teacher = components.open_model(mesh, **config.teacher)
    gkd.check_tokenizers(base.tokenizer, teacher.tokenizer)
    for model in (base.model, teacher.model):
      packing.check_context(config.packing.length, model.config.max_positions)
    policy, params = components.open_policy(
      base, mesh, seed=config.seed, **config.lora
    )
    max_new_tokens = gkd_batches.max_new_tokens(config)
    train_set, eval_set = sets.completions(
      base.tokenizer,
      data=sets.Selection(**config.data),
      held_out=sets.HeldOut(**config.held_out),
      layout=sets.Layout(**config.packing),
      max_new_tokens=max_new_tokens,
      batch_size=config.batch.num_prompts,
      seed=config.seed,
      workdir=workdir,
    )
    distributed.agree(
      {"data": train_set.fingerprint(), "held out": eval_set.fingerprint()}
    )
    sampler = None
    if max_new_tokens:
      start = components.policy_at_start(
        base, policy, params, adapters_path=config.lora.path
      )
      sampler = opened.enter_context(
        components.open_sampler("policy", start, mesh, config)
      )
    export = exports.writer(
      workdir,
      base,
      policy,
      config,
      facts={
        "Recipe": "GKD",
        "Data": config.data.path,
        "Data fingerprint": train_set.fingerprint(),
        "Teacher": config.teacher.path,
      },
    )
    params = gkd.train(
      policy,
      params,
      teacher=gkd.Teacher(teacher.model, teacher.params),
      tokenizer=base.tokenizer,
      sampler=sampler,
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
    functools.partial(processes.run, "Training", "scripts.train_gkd", main),
    config_help=_HELP,
  )
