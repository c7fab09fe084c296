# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning on the assistant's part of conversations."""

from collections.abc import Callable, Mapping, Sequence
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from atlas_jax import checkpoint, sharding
from atlas_jax.data import loader
from atlas_jax.losses import reduce, sft
from atlas_jax.models import decoder
from atlas_jax.train import (
  loop,
  optimizer_step,
  schedule,
  score,
  train_state,
  trainable,
)
from atlas_jax.train import optimizer as train_optimizer
from atlas_jax.train.telemetry import clock as train_clock
from atlas_jax.train.telemetry import flops
from atlas_jax.train.telemetry import writer as train_writer


def train(  # noqa: PLR0913 - one argument per collaborator.
  policy: trainable.Policy,
  params: decoder.Params,
  *,
  train_set: loader.Loader,
  eval_set: loader.Loader,
  on_save: Callable[[decoder.Params, int], None],
  mesh: jax.sharding.Mesh,
  config: Any,  # Any: a ConfigDict, whose values have no static type.
  workdir: pathlib.Path,
  writer: train_writer.Writer,
  should_stop: Callable[[], bool],
) -> decoder.Params:
  """Trains `params`, which it donates, and returns them trained.

  Args:
    policy: what is trained.
    params: of it, where to start; float32 masters, laid out on the mesh.
    train_set: packed conversations.
    eval_set: the same, held out.
    on_save: called after each checkpoint, with the steps done.
    mesh: as `sharding.make_mesh` makes it.
    config: of the recipe; see `configs/run/teacher_sft.py`.
    workdir: holds checkpoints; trained from there if it has any.
    writer: takes the metrics.
    should_stop: asked after each step.

  Raises:
    errors.AtlasError: see `loop.run`.
  """
  score.check_balance(policy.model, **config.experts)
  num_steps = schedule.num_steps(
    config.num_epochs,
    config.loop.num_steps,
    steps_per_epoch=train_set.num_batches_per_epoch,
  )
  rate = schedule.make(**config.schedule, num_updates=num_steps)
  optimizer = train_optimizer.make_optimizer(rate, **config.optimizer)
  offload = train_state.Offload(**config.offload)
  state = train_state.create(params, optimizer, mesh=mesh, offload=offload)
  loss_fn = functools.partial(
    packed_loss, policy.model, **config.loss, **config.experts
  )
  step_fn = optimizer_step.make_step(
    train_optimizer.freeze(loss_fn, config.optimizer.frozen),
    optimizer,
    frozen=policy.frozen,
    shardings=train_state.shardings(state),
  )
  step_fn = functools.partial(
    step_fn, num_microbatches=sharding.num_microbatches(mesh, **config.batch)
  )
  rows = sharding.of_batch(mesh)
  clock = train_clock.Clock()
  count_flops = functools.partial(
    flops.of_update,
    policy.model.config,
    is_base_frozen=policy.adapters is not None,
  )
  task = loop.Task(
    functools.partial(
      _do_step, step_fn, train_set, rows, jax.jit(rate), clock, count_flops
    ),
    functools.partial(_evaluate, jax.jit(loss_fn), policy, eval_set, rows),
    on_save=lambda state, step: on_save(state.params, step),
    row_ids=train_set.row_names,
    clock=clock,
  )
  state = loop.run(
    state,
    task,
    loop.Settings(**{**config.loop, "num_steps": num_steps}),
    checkpointer=checkpoint.Checkpointer(
      workdir / "checkpoints",
      identity={
        "data": train_set.fingerprint(),
        "optimizer": config.optimizer.name,
        **policy.identity(),
      },
      **config.checkpoint,
    ),
    workdir=workdir,
    writer=writer,
    should_stop=should_stop,
  )
  return state.params


def _do_step(
  step_fn: Callable[..., tuple[train_state.TrainState, optimizer_step.Metrics]],
  train_set: loader.Loader,
  rows: jax.sharding.Sharding,
  rate: optax.Schedule,
  clock: train_clock.Clock,
  count_flops: Callable[[Sequence[int]], float],
  state: train_state.TrainState,
  step: int,
) -> tuple[train_state.TrainState, loop.Metrics]:
  """Queues one update, and does not wait for it; see `loop.Task`."""
  with clock.phase("data"):
    batch = train_set.batch(step)
    arrays = _on_mesh(rows, batch)
  with clock.phase("train"):
    state, metrics = step_fn(state, arrays)
  lengths = flops.lengths(batch["segment_ids"])
  # Other processes have as many rows, and nearly as much in them.
  num_parts = len(arrays["segment_ids"]) // len(batch["segment_ids"])
  more = {
    "num_tokens": num_parts * sum(lengths),
    "num_flops": num_parts * count_flops(lengths),
    "learning_rate": rate(step),
  }
  return state, {**metrics, **more}


def _evaluate(
  loss_fn: optimizer_step.LossFn,
  policy: trainable.Policy,
  eval_set: loader.Loader,
  rows: jax.sharding.Sharding,
  state: train_state.TrainState,
  step: int,
) -> loop.Metrics:
  """Averages metrics over all held-out tokens; see `loop.Task`."""
  del step
  params = policy.all_params(state.params)
  batches = map(eval_set.batch, range(eval_set.num_batches_per_epoch))
  return optimizer_step.held_out(
    loss_fn, params, (_on_mesh(rows, batch) for batch in batches)
  )


def _on_mesh(
  rows: jax.sharding.Sharding, batch: Mapping[str, np.ndarray]
) -> optimizer_step.Batch:
  """Lays this host's rows of a batch out on the devices."""
  place = functools.partial(jax.make_array_from_process_local_data, rows)
  return jax.tree.map(place, batch)


def packed_loss(
  model: decoder.Model,
  params: decoder.Params,
  batch: optimizer_step.Batch,
  *,
  z_loss_coef: float,
  chunk_tokens: int,
  router_aux_coef: float,
) -> tuple[jax.Array, tuple[jax.Array, optimizer_step.Metrics]]:
  """Computes the cross entropy of a packed batch (`optimizer_step.LossFn`)."""
  stats, balance = score.token_stats_and_balance(
    model, params, batch, temperature=1.0, chunk_tokens=chunk_tokens
  )
  loss_mask_BT = batch["loss_mask"][:, 1:]
  loss, metrics = sft.cross_entropy(
    stats.logprobs,
    stats.log_normalizer,
    loss_mask_BT,
    z_loss_coef=z_loss_coef,
  )
  kept = {k: metrics[k] for k in ("loss", "cross_entropy")}
  kept["token_accuracy"] = reduce.token_mean(
    stats.is_likeliest.astype(jnp.float32), loss_mask_BT
  )
  loss, kept = score.add_balance(
    model, loss, kept, balance, router_aux_coef=router_aux_coef
  )
  return loss, (jnp.sum(loss_mask_BT), kept)
