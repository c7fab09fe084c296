# SPDX-License-Identifier: Apache-2.0
"""Sections that all training recipes share."""

import ml_collections


def get_world() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(directory="", with_teacher=False)  # components.ensure_world
  )


def get_roles() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(  # teaching.roles.Role
      policy=dict(max_prompt_tokens=0),
      student=dict(max_prompt_tokens=0, max_thinking_tokens=0),
    )
  )


def get_loop() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(  # train.loop.Settings
      num_steps=0,
      log_every=1,
      eval_every=100,
      save_every=100,
      max_nonfinite=5,
      profile_steps="",  # For example "3:5".
      watchdog_s=3600.0,
      require_updates=False,  # Whether a run without any update exits with 4.
    )
  )


def get_report() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    # telemetry.sinks.open_sinks
    dict(to="none", project="atlas_jax", group="", name="")
  )


def get_checkpoint() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(  # checkpoint.Checkpointer
      keep=3,
      max_failed=3,
      allow_changed="",
      best_metric="eval/loss",
      best_mode="min",
      load_best=False,
    )
  )


def get_export() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(  # exports.write
      enabled=True, keep_steps=0, dtype="bfloat16", max_shard_bytes=5 * 10**9
    )
  )
