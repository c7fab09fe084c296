# SPDX-License-Identifier: Apache-2.0
"""GKD: distills a larger, frozen teacher into the policy.

One step: prompts -> completions, sampled from the policy or taken from the
data -> hidden states of both models on these tokens -> an update on the
generalized Jensen-Shannon divergence.

Source: Agarwal et al., arXiv:2306.13649, algorithm 1.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from atlas_jax import chat, errors, sharding, types
from atlas_jax.data import pairs
from atlas_jax.losses import gkd, reduce
from atlas_jax.models import decoder, lora
from atlas_jax.train import (
  batch_shapes,
  gkd_batches,
  held_out_loss,
  loop,
  optimizer_step,
  rollout_packing,
  schedule,
  score,
  train_state,
  trainable,
)
from atlas_jax.train import optimizer as train_optimizer
from atlas_jax.train.telemetry import clock as train_clock
from atlas_jax.train.telemetry import flops

# The key of the teacher's parameters beside the policy's.
_TEACHER = "teacher"

# Packs completions and shards them over the mesh.
_Pack = Callable[[Sequence[rollout_packing.Written]], rollout_packing.Part]


class Teacher(NamedTuple):
  """The frozen model that the policy is distilled from."""

  model: decoder.Model
  params: decoder.Params


@dataclasses.dataclass(frozen=True)
class GkdStep:
  """One GKD step; see `loop.Task.do_step`."""

  policy: trainable.Policy
  teacher: Teacher
  completions: gkd_batches.CompletionBatches
  pack: _Pack
  update: optimizer_step.Step
  clock: train_clock.Clock

  def __call__(
    self, state: train_state.TrainState, step: int
  ) -> tuple[train_state.TrainState, loop.Metrics]:
    """Gets completions and enqueues an update on them."""
    written, sampled = self.completions.take(state.params, step, self.clock)
    with self.clock.phase("data"):
      part = self.pack(written)
    with self.clock.phase("train"):
      checked = self.completions.compare(state.params, part, step)
      state, metrics = self.update(
        state, part.batch, part.num_used, num_microbatches=part.num_microbatches
      )
    lengths = [len(w.prompt) + len(w.completion) for w in written]
    update_flops = flops.of_update(
      self.policy.model.config,
      lengths,
      is_base_frozen=self.policy.adapters is not None,
    )
    teacher_flops = flops.of_forward(self.teacher.model.config, lengths)
    return state, {
      **metrics,
      "num_tokens": sum(lengths),
      "num_flops": update_flops + teacher_flops,
      "padding_fraction": 1.0 - sum(lengths) / part.num_computed,
      **sampled,
      **checked,
    }


def packed_loss(
  policy: decoder.Model,
  teacher: decoder.Model,
  params: decoder.Params,
  batch: optimizer_step.Batch,
  *,
  beta: float,
  temperature: float,
  chunk_tokens: int,
  router_aux_coef: float,
) -> tuple[jax.Array, tuple[jax.Array, optimizer_step.Metrics]]:
  """Computes the divergence of a packed batch; see `optimizer_step.LossFn`.

  Both models read the same rows. `params` come from `with_teacher`; no gradient
  flows to the teacher.
  """
  tokens = batch["token_ids"], batch["positions"], batch["segment_ids"]
  hidden_BTD, balance = policy.hidden_and_balance(params, *tokens)
  hidden_BTE = teacher.hidden(params[_TEACHER], *tokens)
  stats = gkd.of_outputs(
    gkd.Output(
      hidden_BTD[:, :-1], policy.head(params), policy.config.logit_soft_cap
    ),
    gkd.Output(
      hidden_BTE[:, :-1],
      teacher.head(params[_TEACHER]),
      teacher.config.logit_soft_cap,
    ),
    batch["token_ids"][:, 1:],
    beta=beta,
    temperature=temperature,
    chunk_tokens=chunk_tokens,
  )
  mask_BT = batch["loss_mask"][:, 1:]
  loss = reduce.token_mean(stats.divergence, mask_BT)
  metrics = {
    "loss": loss,
    "divergence": loss,
    "cross_entropy": reduce.token_mean(-stats.logprobs, mask_BT),
    "teacher_cross_entropy": reduce.token_mean(
      -stats.teacher_logprobs, mask_BT
    ),
    "token_accuracy": reduce.token_mean(
      stats.is_likeliest.astype(jnp.float32), mask_BT
    ),
  }
  loss, metrics = score.add_balance(
    policy, loss, metrics, balance, router_aux_coef=router_aux_coef
  )
  return loss, (jnp.sum(mask_BT), metrics)


def with_teacher(params: decoder.Params, teacher: Teacher) -> decoder.Params:
  """Adds the teacher's parameters to the policy's."""
  return {**params, _TEACHER: teacher.params}


def train(  # noqa: PLR0913 - one argument per collaborator.
  policy: trainable.Policy,
  params: decoder.Params,
  *,
  teacher: Teacher,
  tokenizer: chat.Tokenizer,
  sampler: types.Sampler | None,
  train_set: pairs.PairLoader,
  eval_set: pairs.PairLoader,
  mesh: jax.sharding.Mesh,
  config: types.Config,
  run: loop.Run,
) -> decoder.Params:
  """Trains `params`, which are donated, and returns the trained ones.

  Args:
    policy: the model to train, called the student in the paper.
    params: its initial trained parameters, sharded over the mesh.
    teacher: on the same mesh and with the same tokenizer.
    tokenizer: of both models.
    sampler: samples from the policy and holds `params`; None if every
      completion comes from the data.
    train_set: prompts with completions.
    eval_set: held-out prompts with completions.
    mesh: see `sharding.make_mesh`.
    config: of the recipe; see `configs/run/teacher_gkd.py`.
    run: where metrics and checkpoints go.

  Raises:
    errors.AtlasError: see `loop.train`, `gkd_batches.CompletionBatches` and
      `agreement.check`.
  """
  _check_loss(config.loss)
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
    packed_loss, policy.model, teacher.model, **config.loss, **config.experts
  )
  update = optimizer_step.make_step(
    train_optimizer.freeze(loss_fn, config.optimizer.frozen),
    optimizer,
    frozen=with_teacher(policy.frozen, teacher),
    shardings=train_state.shardings(state),
  )
  shapes = batch_shapes.of_gkd(config, mesh)
  shapes.log()
  pack = functools.partial(_pack, mesh, shapes)
  completions = _open_completions(policy, teacher, sampler, train_set, config)
  clock = train_clock.Clock()
  do_step = GkdStep(policy, teacher, completions, pack, update, clock)
  evaluate = functools.partial(
    _evaluate, held_out_loss.make(loss_fn), policy, teacher, eval_set, pack
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
      "tokenizer": chat.fingerprint(tokenizer),
      "teacher": lora.fingerprint(jax.jit(lora.checksums)(teacher.params)),
      "optimizer": config.optimizer.name,
      **policy.identity(),
    },
  )
  return state.params


def _open_completions(
  policy: trainable.Policy,
  teacher: Teacher,
  sampler: types.Sampler | None,
  train_set: pairs.PairLoader,
  config: types.Config,
) -> gkd_batches.CompletionBatches:
  """Creates the source of each step's completions."""
  return gkd_batches.CompletionBatches(
    policy,
    sampler,
    train_set,
    params=types.SamplingParams(**config.sampling.complete, seed=config.seed),
    vocab_size=teacher.model.config.vocab_size,
    chunk_tokens=config.loss.chunk_tokens,
    max_prob_error=config.agreement.max_prob_error,
    compare_every=config.agreement.every_steps,
    **config.completions,
  )


def _pack(
  mesh: jax.sharding.Mesh,
  shapes: batch_shapes.Layout,
  written: Sequence[rollout_packing.Written],
) -> rollout_packing.Part:
  """Packs completions into rows and shards the rows over the mesh."""
  part = rollout_packing.pack_rows(written, shapes)
  batch = sharding.put(part.batch, sharding.of_batch(mesh))
  return part._replace(batch=batch)


def _evaluate(
  held_out: held_out_loss.HeldOutLoss,
  policy: trainable.Policy,
  teacher: Teacher,
  eval_set: pairs.PairLoader,
  pack: _Pack,
  state: train_state.TrainState,
  step: int,
) -> loop.Metrics:
  """Averages metrics over all held-out completions; see `loop.Evaluate`."""
  del step
  params = with_teacher(policy.all_params(state.params), teacher)
  batches = map(eval_set.batch, range(eval_set.num_batches_per_epoch))
  parts = (pack(gkd_batches.of_data(batch)) for batch in batches)
  return held_out(
    params, ((p.batch, p.num_used, p.num_microbatches) for p in parts)
  )


def check_tokenizers(policy: chat.Tokenizer, teacher: chat.Tokenizer) -> None:
  """Checks that policy and teacher have the same vocabulary.

  Raises:
    errors.ConfigError: naming a token to which they assign different ids.
  """
  ours, theirs = policy.get_vocab(), teacher.get_vocab()
  if ours == theirs:
    return
  different = sorted(
    token
    for token in ours.keys() | theirs.keys()
    if ours.get(token) != theirs.get(token)
  )
  first = different[0]
  raise errors.ConfigError(
    "Policy and teacher have different tokenizers.",
    where="--config.model.path, --config.teacher.path",
    why=f"{len(different)} tokens have different ids: {first!r} is "
    f"{ours.get(first)} and {theirs.get(first)}. The divergence compares the "
    "probabilities of the same tokens.",
    fix="Use a teacher of the policy's family, for example "
    "Qwen/Qwen2.5-14B-Instruct for Qwen/Qwen2.5-7B-Instruct.",
  )


def _check_loss(loss: types.Config) -> None:
  """Validates beta and temperature."""
  if not 0.0 <= loss.beta <= 1.0 or loss.temperature <= 0.0:
    raise errors.ConfigError(
      "Invalid GKD loss: beta must be in [0, 1] and temperature positive.",
      where=f"--config.loss.beta={loss.beta}, "
      f"--config.loss.temperature={loss.temperature}",
      why="beta is the teacher's weight in the mixture, and the temperature "
      "divides the logits of both models.",
      fix="Set beta to 0.5 and the temperature to 1.0, for example.",
    )
