# SPDX-License-Identifier: Apache-2.0
"""GKD: the policy learns to say what a larger, frozen teacher would say.

One step: prompts -> completions, by the policy or out of the data -> hidden
states of both models on these very tokens -> an update on the generalized
Jensen-Shannon divergence.

Source: Agarwal et al., arXiv:2306.13649, algorithm 1.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from atlas_jax import chat, checkpoint, errors, sharding, types
from atlas_jax.data import pairs
from atlas_jax.losses import gkd, reduce
from atlas_jax.models import decoder, lora
from atlas_jax.train import (
  gkd_batches,
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
from atlas_jax.train.telemetry import writer as train_writer

# Where the teacher's parameters lie beside the policy's.
_TEACHER = "teacher"


class Teacher(NamedTuple):
  """The model that is learnt from. Nothing of it changes."""

  model: decoder.Model
  params: decoder.Params


def train(  # noqa: PLR0913 - one argument per collaborator.
  policy: trainable.Policy,
  params: decoder.Params,
  *,
  teacher: Teacher,
  tokenizer: chat.Tokenizer,
  sampler: types.Sampler | None,
  train_set: pairs.PairLoader,
  eval_set: pairs.PairLoader,
  on_save: Callable[[decoder.Params, int], None],
  mesh: jax.sharding.Mesh,
  config: Any,  # Any: a ConfigDict, whose values have no static type.
  workdir: pathlib.Path,
  writer: train_writer.Writer,
  should_stop: Callable[[], bool],
) -> decoder.Params:
  """Trains `params`, which it donates, and returns them trained.

  Args:
    policy: what is trained; the student of the distillation.
    params: of it, where to start; laid out on the mesh.
    teacher: on the same mesh, and of the same tokenizer.
    tokenizer: of both.
    sampler: of the policy, holding `params`; None where nothing is sampled.
    train_set: prompts with completions.
    eval_set: the same, held out.
    on_save: called after each checkpoint, with the steps done.
    mesh: as `sharding.make_mesh` makes it.
    config: of the recipe; see `configs/run/teacher_gkd.py`.
    workdir: holds checkpoints; trained from there if it has any.
    writer: takes the metrics.
    should_stop: asked after each step.

  Raises:
    errors.AtlasError: see `loop.run`, `completions.Completions` and
      `agreement.check`.
  """
  _check(config)
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
    packed_loss, policy.model, teacher.model, **config.loss, **config.experts
  )
  step_fn = optimizer_step.make_step(
    train_optimizer.freeze(loss_fn, config.optimizer.frozen),
    optimizer,
    frozen=with_teacher(policy.frozen, teacher),
    shardings=train_state.shardings(state),
  )
  clock = train_clock.Clock()
  lay_out = functools.partial(
    _lay_out,
    sharding.of_batch(mesh),
    num_shards=sharding.num_row_shards(mesh),
    length=config.packing.length,
    packed=config.packing.packed,
    per_device=config.batch.per_device,
  )
  completions = gkd_batches.CompletionBatches(
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
  task = loop.Task(
    _Step(policy, teacher, completions, lay_out, step_fn, jax.jit(rate), clock),
    functools.partial(
      _evaluate, jax.jit(loss_fn), policy, teacher, eval_set, lay_out
    ),
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
        "tokenizer": chat.fingerprint(tokenizer),
        "teacher": lora.fingerprint(jax.jit(lora.checksums)(teacher.params)),
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


def check_tokenizers(policy: chat.Tokenizer, teacher: chat.Tokenizer) -> None:
  """Refuses a teacher that reads other tokens than the policy writes.

  Raises:
    errors.ConfigError: with a token that they number differently.
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
    why=f"They number {len(different)} tokens differently: {first!r} is "
    f"{ours.get(first)} and {theirs.get(first)}. The divergence compares what "
    "both think of the same tokens.",
    fix="Take a teacher of the policy's family, for example "
    "Qwen/Qwen2.5-14B-Instruct for Qwen/Qwen2.5-7B-Instruct.",
  )


def with_teacher(params: decoder.Params, teacher: Teacher) -> decoder.Params:
  """Gives the teacher's parameters a place beside the policy's."""
  return {**params, _TEACHER: teacher.params}


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

  Both models read the same rows. `params` are as `with_teacher` gives them; no
  gradient flows to the teacher's.
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


# Gives a batch on the mesh, and its number of microbatches.
_LayOut = Callable[
  [Sequence[rollout_packing.Written]], tuple[dict[str, jax.Array], int]
]


@dataclasses.dataclass(frozen=True)
class _Step:
  """One step of the recipe; see `loop.Task`."""

  policy: trainable.Policy
  teacher: Teacher
  completions: gkd_batches.CompletionBatches
  lay_out: _LayOut
  step_fn: optimizer_step.Step
  rate: optax.Schedule
  clock: train_clock.Clock

  def __call__(
    self, state: train_state.TrainState, step: int
  ) -> tuple[train_state.TrainState, loop.Metrics]:
    """Gets completions, and queues an update on them."""
    written, sampled = self.completions.take(state.params, step, self.clock)
    with self.clock.phase("data"):
      batch, num_microbatches = self.lay_out(written)
    with self.clock.phase("train"):
      checked = self.completions.compare(
        state.params, batch, num_microbatches, step
      )
      state, metrics = self.step_fn(
        state, batch, num_microbatches=num_microbatches
      )
    lengths = [len(w.prompt) + len(w.completion) for w in written]
    update = flops.of_update(
      self.policy.model.config,
      lengths,
      is_base_frozen=self.policy.adapters is not None,
    )
    forward = flops.of_forward(self.teacher.model.config, lengths)
    more = {
      "num_tokens": sum(lengths),
      "num_flops": update + forward,
      "padding_fraction": 1.0 - sum(lengths) / batch["token_ids"].size,
      "learning_rate": self.rate(step),
    }
    return state, {**metrics, **more, **sampled, **checked}


def _lay_out(
  place: jax.sharding.Sharding,
  written: Sequence[rollout_packing.Written],
  **settings: Any,  # Any: of `rollout_packing.pack_rows`.
) -> tuple[dict[str, jax.Array], int]:
  """Packs completions into rows, and these onto the devices."""
  batch, num_microbatches = rollout_packing.pack_rows(written, **settings)
  return sharding.put(batch, place), num_microbatches


def _evaluate(
  loss_fn: optimizer_step.LossFn,
  policy: trainable.Policy,
  teacher: Teacher,
  eval_set: pairs.PairLoader,
  lay_out: _LayOut,
  state: train_state.TrainState,
  step: int,
) -> loop.Metrics:
  """Averages metrics over all held-out completions; see `loop.Task`."""
  del step
  params = with_teacher(policy.all_params(state.params), teacher)
  batches = map(eval_set.batch, range(eval_set.num_batches_per_epoch))
  return optimizer_step.held_out(
    loss_fn,
    params,
    (lay_out(gkd_batches.of_data(batch))[0] for batch in batches),
  )


def _check(config: Any) -> None:  # Any: as in `train`.
  """Refuses a divergence that there is not."""
  loss = config.loss
  if not 0.0 <= loss.beta <= 1.0 or loss.temperature <= 0.0:
    raise errors.ConfigError(
      "There is no such divergence.",
      where=f"--config.loss.beta={loss.beta}, "
      f"--config.loss.temperature={loss.temperature}",
      why="beta is the teacher's part in the mixture, from 0 to 1, and both "
      "models' logits are divided by the temperature.",
      fix="Set beta to 0.5 and the temperature to 1.0, for example.",
    )
