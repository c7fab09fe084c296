# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning on the assistant's part of conversations."""

import collections
from collections.abc import Callable
import functools
import pathlib
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from atlas_jax import chat, checkpoint, errors, sharding
from atlas_jax.data import formats, loader, packing, sources
from atlas_jax.losses import reduce, sft
from atlas_jax.models import decoder
from atlas_jax.train import clock as train_clock
from atlas_jax.train import loop, score
from atlas_jax.train import optimizer as train_optimizer
from atlas_jax.train import state as train_state
from atlas_jax.train import step as train_step
from atlas_jax.train import writer as train_writer


def train(  # noqa: PLR0913 - one argument per collaborator.
  model: decoder.Model,
  params: decoder.Params,
  *,
  train_set: loader.Loader,
  eval_set: loader.Loader,
  mesh: jax.sharding.Mesh,
  config: Any,  # Any: a ConfigDict, whose values have no static type.
  workdir: pathlib.Path,
  writer: train_writer.Writer,
  should_stop: Callable[[], bool],
) -> decoder.Params:
  """Trains `params`, which it donates, and returns them trained.

  Args:
    model: the decoder.
    params: where to start; float32 masters, laid out on the mesh.
    train_set: packed conversations.
    eval_set: the same, held out.
    mesh: as `sharding.make_mesh` makes it.
    config: sections `optimizer`, `batch`, `loss`, `offload`, `loop` and
      `checkpoint`.
    workdir: holds checkpoints; trained from there if it has any.
    writer: takes the metrics.
    should_stop: asked after each step.

  Raises:
    errors.AtlasError: see `loop.run`.
  """
  num_steps = _num_steps(config, train_set)
  schedule = train_optimizer.make_schedule(
    **config.schedule, num_updates=num_steps
  )
  optimizer = train_optimizer.make_optimizer(schedule, **config.optimizer)
  offload = train_state.Offload(**config.offload)
  state = train_state.create(params, optimizer, mesh=mesh, offload=offload)
  loss_fn = functools.partial(_loss, model, **config.loss)
  step_fn = train_step.make_step(
    loss_fn,
    optimizer,
    num_microbatches=config.batch.num_microbatches,
    shardings=train_state.shardings(state),
  )
  eval_fn = jax.jit(loss_fn)
  on_mesh = functools.partial(
    jax.make_array_from_process_local_data, sharding.of_batch(mesh)
  )

  clock = train_clock.Clock()

  def do_step(
    state: train_state.TrainState, step: int
  ) -> tuple[train_state.TrainState, loop.Metrics]:
    with clock.phase("data"):
      batch = train_set.batch(step)
      arrays = jax.tree.map(on_mesh, batch)
    with clock.phase("train"):
      state, metrics = step_fn(state, arrays)
    num_tokens = int((batch["segment_ids"] > 0).sum())
    rate = float(np.asarray(schedule(step)))
    return state, {**metrics, "num_tokens": num_tokens, "learning_rate": rate}

  def evaluate(state: train_state.TrainState, step: int) -> loop.Metrics:
    del step
    totals: dict[str, float] = collections.defaultdict(float)
    weight = 0.0
    for i in range(eval_set.num_batches_per_epoch):
      batch = jax.tree.map(on_mesh, eval_set.batch(i))
      _, (num_tokens, means) = eval_fn(state.params, batch)
      for name, mean in means.items():
        totals[name] += float(mean * num_tokens)
      weight += float(num_tokens)
    return {f"eval/{k}": v / max(weight, 1.0) for k, v in totals.items()}

  state = loop.run(
    state,
    do_step,
    evaluate,
    checkpointer=checkpoint.Checkpointer(
      workdir / "checkpoints",
      identity={"data": train_set.fingerprint()},
      **config.checkpoint,
    ),
    workdir=workdir,
    writer=writer,
    clock=clock,
    should_stop=should_stop,
    **{**config.loop, "num_steps": num_steps},
  )
  return state.params


def _num_steps(config: Any, train_set: loader.Loader) -> int:  # Any: as above.
  """Reads how long to train, told in epochs or in steps."""
  num_epochs, num_steps = config.num_epochs, config.loop.num_steps
  if bool(num_epochs) == bool(num_steps):
    raise errors.ConfigError(
      "The length of the run must be told in one way.",
      where="--config.num_epochs, --config.loop.num_steps",
      why=f"They are {num_epochs} and {num_steps}.",
      fix="Set one of them, and the other to 0.",
    )
  return num_steps or num_epochs * train_set.num_batches_per_epoch


def make_sets(  # noqa: PLR0913 - one argument per config key.
  tokenizer: chat.Tokenizer,
  *,
  batch_size: int,
  seed: int,
  path: str,
  validation_path: str,
  validation_fraction: float,
  format_name: str,
  length: int,
  packed: bool,
  too_long: packing.TooLong,
) -> tuple[loader.Loader, loader.Loader]:
  """Reads, renders and packs the training and the held-out set.

  Args:
    tokenizer: with a chat template.
    batch_size: rows per step.
    seed: of the order, and of what is held out.
    path: see `sources.read`.
    validation_path: the same; empty to hold out a part of `path`.
    validation_fraction: that part; 0.0 if `validation_path` is set.
    format_name: a key of `formats.DATA_CONFIGS`.
    length: tokens in a row.
    packed: several conversations in a row, or one.
    too_long: what to do with conversations longer than a row.

  Raises:
    errors.ConfigError: if the two ways to name a held-out set contradict.
    errors.DataError: if the data cannot be used.
  """
  _check_choices(validation_path, validation_fraction, format_name)

  def tokenized(path: str) -> list[packing.Example]:
    layout = formats.DATA_CONFIGS[format_name]
    return [
      chat.tokenize(tokenizer, formats.to_messages(row, layout))
      for row in sources.read(path)
    ]

  def load(
    examples: list[packing.Example], remainder: loader.Remainder
  ) -> loader.Loader:
    lay_out = packing.pack if packed else packing.pad
    arrays, num_too_long = lay_out(examples, length, too_long=too_long)
    logging.info(
      "%d conversations in %d rows of %d tokens; %d too long.",
      *(len(examples), len(arrays["token_ids"]), length, num_too_long),
    )
    return loader.Loader(
      arrays,
      batch_size=batch_size,
      seed=seed,
      remainder=remainder,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )

  examples = tokenized(path)
  if validation_path:
    held_out = tokenized(validation_path)
  else:
    order = np.random.default_rng(seed).permutation(len(examples))
    num_held_out = max(1, round(validation_fraction * len(order)))
    held_out = [examples[i] for i in order[:num_held_out]]
    examples = [examples[i] for i in order[num_held_out:]]
  return load(examples, "drop"), load(held_out, "pad")


def _check_choices(
  validation_path: str, validation_fraction: float, format_name: str
) -> None:
  """Refuses what contradicts itself or is not there."""
  if bool(validation_path) == bool(validation_fraction):
    raise errors.ConfigError(
      "There must be one held-out set.",
      where="--config.data",
      why=f"validation_path={validation_path!r} and "
      f"validation_fraction={validation_fraction}.",
      fix="Set one of them.",
    )
  if format_name not in formats.DATA_CONFIGS:
    raise errors.ConfigError(
      f"There is no data format {format_name!r}.",
      where="--config.data.format_name",
      why=f"The formats are {', '.join(formats.DATA_CONFIGS)}.",
      fix="Name one of them.",
    )


def _loss(
  model: decoder.Model,
  params: decoder.Params,
  batch: train_step.Batch,
  *,
  z_loss_coef: float,
  chunk_size: int,
) -> tuple[jax.Array, tuple[jax.Array, train_step.Metrics]]:
  """Computes the cross entropy of a packed batch; see `step.LossFn`."""
  stats = score.token_stats(
    model, params, batch, temperature=1.0, chunk_size=chunk_size
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
  return loss, (jnp.sum(loss_mask_BT), kept)
