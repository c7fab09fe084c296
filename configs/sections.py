# SPDX-License-Identifier: Apache-2.0
"""Sections that all training recipes share."""

import ml_collections


def get_world() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(  # scripts.small_world.ensure
      directory="",  # Folder of the small world of smoke runs; empty: none.
    )
  )


def get_roles() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(  # teaching.roles.Role
      policy=dict(
        # Longer prompts are dropped, in tokens; 0: what fits the context.
        max_prompt_tokens=0,
      ),
      student=dict(
        # Longer prompts are dropped, in tokens; 0: what fits the context.
        max_prompt_tokens=0,
        # Limit on thinking before an answer, in tokens; 0: part of the
        # answer's limit.
        max_thinking_tokens=0,
      ),
    )
  )


def get_held_out() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(  # data.sets.HeldOut
      path="",  # Data to evaluate on, like data.path; empty: none.
      fraction=0.0,  # Fraction of the training problems, instead of a path.
    )
  )


def get_sampler() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(  # rollout.sampler.open_sampler
      max_rows=256,  # Completions decoded at once, in this process.
    )
  )


def get_agreement() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(  # train.guards.agreement.check
      # Bound on the mean factor between a token's probability in trainer and
      # sampler.
      max_prob_error=1.02,
      every_steps=1,  # Steps between comparisons of the two.
    )
  )


def get_experts() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(  # train.score.check_balance
      router_aux_coef=0.0,  # Weight of the experts' load-balancing loss.
    )
  )


def get_schedule() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(  # train.schedule.make
      learning_rate=1e-5,  # Peak learning rate.
      schedule="cosine",  # After the warmup: constant, linear, cosine or wsd.
      warmup_fraction=0.0,  # Warmup, as a fraction of all steps.
      warmup_steps=0,  # Warmup in steps, instead of a fraction.
      decay_fraction=0.0,  # Decay of wsd, as a fraction of all steps.
    )
  )


def get_offload() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(  # train.train_state.Offload
      optimizer=False,  # Whether to keep its state in host memory.
    )
  )


def get_loop() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(  # train.loop.Settings
      num_steps=0,  # Steps to train; 0: by num_epochs, where there is one.
      log_every=1,  # Steps between lines of metrics.
      eval_every=100,  # Steps between evaluations; 0: at the end only.
      save_every=100,  # Steps between checkpoints; the last is saved too.
      max_nonfinite=5,  # Updates in a row that may be skipped as non-finite.
      profile_steps="",  # Steps to trace, such as "3:5"; empty: none.
      watchdog_s=3600.0,  # Seconds a step may take; 0.0: no limit.
      require_updates=False,  # Whether a run without any update exits with 4.
    )
  )


def get_report() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(  # train.telemetry.sinks.open_sinks
      to="none",  # tensorboard, wandb and trackio, by commas; or none.
      project="atlas_jax",  # Project in the tracker.
      group="",  # Group within the project.
      name="",  # Name of the run; empty: that of the workdir.
    )
  )


def get_checkpoint() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(  # checkpoint.Checkpointer
      keep=3,  # Newest checkpoints to keep.
      max_failed=3,  # Failed saves in a row that stop the run.
      # Parts that may change on resume, by commas: data, student, optimizer.
      allow_changed="",
      best_metric="eval/loss",  # Keeps the best checkpoint; empty: none.
      best_mode="min",  # Whether the best value is the min or max.
      load_best=False,  # Whether to finish with the best checkpoint.
    )
  )


def get_export() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(  # scripts.job.exports.write
      enabled=True,  # Whether to write WORKDIR/export at the end.
      keep_steps=0,  # Exports of checkpoints to keep; 0: writes none.
      dtype="bfloat16",  # Precision of the files: bfloat16 or float32.
      max_shard_bytes=5 * 10**9,  # Largest file, in bytes.
    )
  )
