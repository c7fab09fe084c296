# SPDX-License-Identifier: Apache-2.0
"""Trains by GRPO: a teacher, rewarded on its student, or a single model.

  python -m scripts.train_grpo --config=configs/run/teacher_rcl.py:smoke \
    --workdir=results/grpo --config.model.path=results/sft/export

All state is in the workdir: the same command resumes a stopped run.
"""

from collections.abc import Iterator
import contextlib
import functools

import jax

from atlas_jax import sharding, types
from atlas_jax.data import sets
from atlas_jax.rewards import combine, custom, grading
from atlas_jax.teaching import protocol, single_model
from atlas_jax.train import grpo, loop
from scripts import program
from scripts.job import (
  arguments,
  components,
  config_help,
  exports,
  outcome,
  print_config,
  processes,
  reward_functions,
  show_samples,
)
from scripts.plan import report

_HELP = config_help.ConfigHelp(
  "teacher_rcl.py",
  (
    "model.path",
    "student.path",
    "data.path",
    "loop.num_steps",
    "schedule.learning_rate",
    "batch.num_questions",
    "sampling.teach.group_size",
    "sampling.teach.max_completion_tokens",
    "loss.kl_coef",
    "lora.rank",
  ),
)


def main() -> None:
  """Runs one training job to its end."""
  if (
    print_config.print_if_requested("grpo")
    or show_samples.print_if_requested("grpo")
    or report.print_plan("grpo")
  ):
    return
  config, workdir = arguments.parse("grpo")
  functions = reward_functions.parse()
  with components.start(workdir, config) as should_stop:
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
    with _open_rollouts(start, mesh, config, functions) as (
      rollouts,
      grader,
      reward_fn,
    ):
      params = grpo.train(
        policy,
        params,
        protocol=rollouts,
        grader=grader,
        reward_fn=reward_fn,
        questions=questions,
        held_out=held_out,
        evaluation=components.evaluation_rollouts(rollouts, config),
        mesh=mesh,
        config=config,
        run=loop.Run(workdir, writer, export, should_stop),
      )
      export(params, None)
      outcome.report(workdir, config)


@contextlib.contextmanager
def _open_rollouts(
  policy: components.OpenModel,
  mesh: jax.sharding.Mesh,
  config: types.Config,
  functions: custom.Functions,
) -> Iterator[
  tuple[
    protocol.Protocol | single_model.SingleModelRollouts,
    grading.Grader,
    types.RewardFn,
  ]
]:
  """Opens the rollouts, with or without a student, grader and reward."""
  with contextlib.ExitStack() as opened:
    scorer = None
    if "student" in config:
      student = components.open_model(
        mesh,
        **config.student,
        # The reward rlt scores in this process even if servers sample.
        with_params=config.rollout.backend == "jax"
        or bool(config.reward.weights.rlt),
      )
      rollouts = opened.enter_context(
        components.open_protocol(policy, student, mesh, config)
      )
      scorer = components.open_student_scorer(
        policy, student, rollouts, mesh, config
      )
    else:
      rollouts = opened.enter_context(
        components.open_single_model(policy, mesh, config)
      )
    grader = opened.enter_context(
      components.open_grader(config.reward.math_verify)
    )
    reward_fn = opened.enter_context(
      components.open_reward(scorer, grader, functions, config)
    )
    yield rollouts, grader, reward_fn


if __name__ == "__main__":
  program.run(
    functools.partial(processes.run, "Training", "scripts.train_grpo", main),
    config_help=_HELP,
  )
