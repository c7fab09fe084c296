# SPDX-License-Identifier: Apache-2.0
"""Trains by GRPO: a teacher, rewarded on its student, or a single model.

  python -m scripts.train_grpo --config=configs/run/teacher_rcl.py:smoke \
    --workdir=results/grpo --config.model.path=results/sft/export

All state is in the workdir: the same command resumes a stopped run.
"""

import contextlib
import functools

from atlas_jax import sharding
from atlas_jax.data import sets
from atlas_jax.rewards import combine
from atlas_jax.train import grpo, loop
from scripts import program
from scripts.job import (
  arguments,
  components,
  exports,
  print_config,
  processes,
  reward_functions,
)
from scripts.plan import report


def main() -> None:
  """Runs one training job to its end."""
  if print_config.print_if_requested() or report.print_plan("grpo"):
    return
  config, workdir = arguments.parse("grpo")
  functions = reward_functions.parse()
  with (
    components.start(workdir, config) as should_stop,
    contextlib.ExitStack() as opened,
  ):
    writer = components.open_writer(workdir, config)
    mesh = sharding.make_mesh(**config.mesh)
    questions, held_out = sets.questions(
      sets.Selection(**config.data),
      sets.HeldOut(**config.held_out),
      batch_size=config.batch.num_questions,
      seed=config.seed,
      workdir=workdir,
    )
    held_out = held_out[: config.evaluation.num_questions]
    base = components.open_model(mesh, **config.model)
    policy, params = components.open_policy(
      base, mesh, seed=config.seed, **config.lora
    )
    start = components.policy_at_start(
      base, policy, params, adapters_path=config.lora.path
    )
    if "student" in config:
      student = components.open_model(
        mesh,
        **config.student,
        # The reward rlt scores in this process even if servers sample.
        with_params=config.rollout.backend == "jax"
        or bool(config.reward.weights.rlt),
      )
      protocol = opened.enter_context(
        components.open_protocol(start, student, mesh, config)
      )
      reader = components.open_student_scorer(
        base, student, protocol, mesh, config
      )
    else:
      protocol = opened.enter_context(
        components.open_single_model(start, mesh, config)
      )
      reader = None
    reward_fn = opened.enter_context(
      components.open_reward(reader, functions, config)
    )
    export = exports.writer(
      workdir,
      base,
      policy,
      config,
      facts={
        "Recipe": "GRPO",
        "Data": config.data.path,
        "Data fingerprint": questions.fingerprint(),
        "Student": config.student.path if "student" in config else "none",
        "Reward": combine.describe(config.reward.weights, functions),
      },
    )
    params = grpo.train(
      policy,
      params,
      protocol=protocol,
      reward_fn=reward_fn,
      questions=questions,
      held_out=held_out,
      mesh=mesh,
      config=config,
      run=loop.Run(workdir, writer, export, should_stop),
    )
    export(params, None)


if __name__ == "__main__":
  program.run(
    functools.partial(processes.run, "Training", "scripts.train_grpo", main)
  )
