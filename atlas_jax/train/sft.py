# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning on the assistant turns of conversations."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax import sharding, types
from atlas_jax.data import loader
from atlas_jax.losses import reduce, sft
from atlas_jax.models import decoder
from atlas_jax.train import (
  held_out_loss,
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


@dataclasses.dataclass(frozen=True)
class SftStep:
  """One SFT step; see `loop.Task.do_step`."""

  train_set: loader.Loader
  rows: jax.sharding.Sharding
  update: Callable[..., tuple[train_state.TrainState, optimizer_step.Metrics]]
  num_microbatches: int
  count_flops: Callable[[Sequence[int]], float]
  clock: train_clock.Clock

  def __call__(
    self, state: train_state.TrainState, step: int
  ) -> tuple[train_state.TrainState, loop.Metrics]:
    """Enqueues one update without waiting for it."""
    with self.clock.phase("data"):
      batch = self.train_set.batch(step)
      arrays = _on_mesh(self.rows, batch)
    with self.clock.phase("train"):
      state, metrics = self.update(
        state,
        arrays,
        _num_used(self.train_set, step, self.num_microbatches),
        num_microbatches=self.num_microbatches,
      )
    lengths = flops.lengths(batch["segment_ids"])
    # Other processes hold as many rows, with nearly as many tokens.
    num_parts = len(arrays["segment_ids"]) // len(batch["segment_ids"])
    return state, {
      **metrics,
      "num_tokens": num_parts * sum(lengths),
      "num_flops": num_parts * self.count_flops(lengths),
    }


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


def train(
  policy: trainable.Policy,
  params: decoder.Params,
  *,
  train_set: loader.Loader,
  eval_set: loader.Loader,
  mesh: jax.sharding.Mesh,
  config: types.Config,
  run: loop.Run,
) -> decoder.Params:
  """Trains `params`, which are donated, and returns the trained ones.

  Args:
    policy: the model and which of its parameters are trained.
    params: initial trained parameters: float32 masters, sharded over the mesh.
    train_set: packed conversations.
    eval_set: held-out packed conversations.
    mesh: see `sharding.make_mesh`.
    config: of the recipe; see `configs/run/teacher_sft.py`.
    run: where metrics and checkpoints go.

  Raises:
    errors.AtlasError: see `loop.train`.
  """
  score.check_balance(policy.model, **config.experts)
  num_steps = schedule.num_steps(
    config.num_epochs,
    config.loop.num_steps,
    steps_per_epoch=train_set.num_batches_per_epoch,
  )
  rate, optimizer, state = train_state.start(
    params, config, num_steps=num_steps, mesh=mesh
  )
  loss_fn = functools.partial(
    packed_loss, policy.model, **config.loss, **config.experts
  )
  update = optimizer_step.make_step(
    train_optimizer.freeze(loss_fn, config.optimizer.frozen),
    optimizer,
    frozen=policy.frozen,
    shardings=train_state.shardings(state),
  )
  num_microbatches = sharding.num_microbatches(mesh, **config.batch)
  rows, clock = sharding.of_batch(mesh), train_clock.Clock()
  do_step = SftStep(
    train_set,
    rows,
    update,
    num_microbatches,
    functools.partial(
      flops.of_update,
      policy.model.config,
      is_base_frozen=policy.adapters is not None,
    ),
    clock,
  )
  evaluate = functools.partial(
    _evaluate,
    held_out_loss.make(loss_fn),
    policy,
    eval_set,
    rows,
    num_microbatches,
  )
  state = loop.train(
    state,
    loop.Task(
      do_step, evaluate, rate, row_ids=train_set.row_names, clock=clock
    ),
    config,
    run,
    num_steps=num_steps,
    identity={
      "data": train_set.fingerprint(),
      "optimizer": config.optimizer.name,
      **policy.identity(),
    },
  )
  return state.params


def _evaluate(
  held_out: held_out_loss.HeldOutLoss,
  policy: trainable.Policy,
  eval_set: loader.Loader,
  rows: jax.sharding.Sharding,
  num_microbatches: int,
  state: train_state.TrainState,
  step: int,
) -> loop.Metrics:
  """Averages metrics over all held-out tokens; see `loop.Evaluate`."""
  del step
  params = policy.all_params(state.params)
  return held_out(
    params,
    (
      (
        _on_mesh(rows, eval_set.batch(number)),
        _num_used(eval_set, number, num_microbatches),
        num_microbatches,
      )
      for number in range(eval_set.num_batches_per_epoch)
    ),
  )


def _num_used(
  data: loader.Loader, step: int, num_microbatches: int
) -> int | None:
  """Returns how many microbatches of a padded batch have rows; None for all.

  Row r is in microbatch r % num_microbatches: see `optimizer_step.accumulate`.
  """
  num_rows = len(data.row_names(step))
  return num_rows if num_rows < num_microbatches else None


def _on_mesh(
  rows: jax.sharding.Sharding, batch: Mapping[str, np.ndarray]
) -> optimizer_step.Batch:
  """Shards a batch, of which this process holds its own rows, over the mesh."""
  place = functools.partial(jax.make_array_from_process_local_data, rows)
  return jax.tree.map(place, batch)
