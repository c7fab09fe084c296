# SPDX-License-Identifier: Apache-2.0
"""Counts the memory of an update on each device without creating arrays.

The state is described by `train_state.describe`, as in training, so its bytes
are exact. Activations are counted by tracing the model's gradient: they are the
residuals that the forward pass keeps for the backward pass under `remat`. The
trace is of the decoder that one device computes, with its share of heads and
widths. Temporaries of the compiler are estimated; `compile_update` measures
them.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
from jax.extend import core as jax_core
import jax.numpy as jnp
import optax

from atlas_jax import sharding
from atlas_jax.models import attention, decoder, lora, quantized
from atlas_jax.train import gkd, optimizer_step, score, train_state, trainable

# `decoder.build` with all arguments but the config bound.
Build = Callable[..., decoder.Model]
# A described policy and its trained parameters.
_Share = tuple[trainable.Policy, decoder.Params]

# Float32 arrays [tokens of a chunk, V] alive at one time: logits, exponentials
# and the gradient of the logits; with a teacher also its logits, both
# log-probabilities and those of the mixture.
_LOGITS_ALIVE = 3
_LOGITS_ALIVE_WITH_TEACHER = 7


@dataclasses.dataclass(frozen=True)
class Rows:
  """The rows of an update.

  Attributes:
    per_device: rows of a microbatch on each device.
    num_microbatches: microbatches, whose gradients are accumulated.
    length: tokens of a row.
    chunk_tokens: tokens of a row whose logits exist at one time.
  """

  per_device: int
  num_microbatches: int
  length: int
  chunk_tokens: int


class Compiled(NamedTuple):
  """Bytes per device of a compiled update, from XLA's memory analysis."""

  arguments: int
  temporaries: int


def num_bytes(tree: Any, *, on_host: bool = False) -> int:
  """Counts the bytes of one device's shards of arrays.

  Args:
    tree: arrays or `ShapeDtypeStruct`s with shardings.
    on_host: counts the arrays in pinned host memory instead of the others.
  """
  total = 0
  for leaf in jax.tree.leaves(tree):
    if (leaf.sharding.memory_kind == "pinned_host") == on_host:
      shape = leaf.sharding.shard_shape(leaf.shape)
      total += math.prod(shape) * leaf.dtype.itemsize
  return total


def num_global_bytes(tree: Any) -> int:
  """Counts the bytes of unsharded arrays, as in a checkpoint."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def of_update(
  policy: trainable.Policy,
  state: train_state.TrainState,
  build: Build,
  rows: Rows,
  *,
  mesh: jax.sharding.Mesh,
  teacher: gkd.Teacher | None = None,
) -> dict[str, int]:
  """Counts bytes per device, by class, while an update is computed.

  Args:
    policy: the described policy.
    state: its described state, from `train_state.describe`.
    build: builds a decoder like the policy's base from another config.
    rows: the rows of the update.
    mesh: the mesh of the state.
    teacher: the described teacher that reads the same rows, or None.

  Returns:
    Bytes by name, of the state and of the update's temporaries. The loss and a
    block are differentiated one after the other, so only the larger of the two
    is counted: `logits` is 0 if that is the block.
  """
  rows = _rows_share(rows, mesh)
  share = _share(policy, build, mesh)
  kept = _kept(share, rows)
  # The gradients of a block reuse the memory of its activations.
  block = _kept(_share(policy, build, mesh, num_layers=1, remat="none"), rows)
  logits = _logits(share, rows, has_teacher=teacher is not None)
  head, layer = _gathered(policy, state, teacher)
  if teacher is not None:
    # Its hidden states are kept for the loss and its gradient.
    hidden = rows.per_device * rows.length * teacher.model.config.width
    kept += hidden * jnp.dtype(teacher.model.dtype).itemsize
  is_logits = logits + head > block + layer
  return {
    "parameters": num_bytes(state.params),
    "frozen base": num_bytes(policy.frozen),
    "optimizer": num_bytes(state.opt_state),
    "reference": num_bytes(state.reference),
    "teacher": num_bytes(teacher and teacher.params),
    "gradients": _gradients(state.params, rows),
    "activations": kept + (0 if is_logits else block),
    "logits": logits if is_logits else 0,
    "gathered weights": head if is_logits else layer,
  }


def _gradients(params: decoder.Params, rows: Rows) -> int:
  """Counts the bytes of a gradient, and of its float32 sum over microbatches.

  A gradient has the dtype of its parameter.
  """
  gradient = num_bytes(params)
  if rows.num_microbatches == 1:
    return gradient
  described = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding),
    params,
  )
  return gradient + num_bytes(described)


def _logits(share: _Share, rows: Rows, *, has_teacher: bool) -> int:
  """Counts the bytes of a chunk's logits while the loss is differentiated."""
  num_alive = _LOGITS_ALIVE_WITH_TEACHER if has_teacher else _LOGITS_ALIVE
  chunk = rows.per_device * min(rows.chunk_tokens, rows.length)
  return 4 * num_alive * chunk * share[0].model.config.vocab_size


def _gathered(
  policy: trainable.Policy,
  state: train_state.TrainState,
  teacher: gkd.Teacher | None,
) -> tuple[int, int]:
  """Counts the bytes of the gathered head, and of one gathered layer.

  Sharded weights are gathered before use. The gradients of trained ones are
  whole too, until they are sharded again, so these count twice.
  """
  config = policy.base.config
  head, layer = (
    _num_gathered(policy.frozen.get(part), num_copies=1)
    + _num_gathered(state.params.get(part), num_copies=2)
    for part in ("embed" if config.tie_embeddings else "head", "layers")
  )
  layer //= config.num_layers
  if teacher is not None:
    head += _num_gathered(_head(teacher), num_copies=1)
    its_layers = _num_gathered(teacher.params["layers"], num_copies=1)
    layer = max(layer, its_layers // teacher.model.config.num_layers)
  return head, layer


def of_cache(
  model: decoder.Model,
  *,
  num_rows: int,
  num_slots: int,
  mesh: jax.sharding.Mesh,
) -> int:
  """Counts bytes per device of the sampler's KV cache.

  Args:
    model: the sampled model.
    num_rows: completions decoded at once, over all devices.
    num_slots: tokens of the longest prompt with its completion.
    mesh: shards the rows, as in `sharding.of_batch`.
  """
  cache = jax.eval_shape(
    lambda: attention.empty_cache(
      model.config, num_rows, num_slots, model.dtype
    )
  )
  return -(-num_global_bytes(cache) // sharding.num_row_shards(mesh))


def compile_update(
  policy: trainable.Policy,
  state: train_state.TrainState,
  optimizer: optax.GradientTransformation,
  rows: Rows,
  *,
  mesh: jax.sharding.Mesh,
  teacher: gkd.Teacher | None = None,
) -> Compiled:
  """Compiles an update for the mesh's devices; returns its memory analysis.

  The devices may be simulated, as many as the real mesh has. The loss is the
  mean log-probability of all tokens, or the divergence from the teacher; the
  terms that a recipe adds to it are only arrays [B, T].
  """

  def logprobs_loss(params: decoder.Params, batch: optimizer_step.Batch) -> Any:
    loss = -jnp.mean(_logprobs(policy.model, rows, params, batch))
    return loss, (jnp.ones(()), {"loss": loss})

  loss_fn, frozen = logprobs_loss, policy.frozen
  if teacher is not None:
    loss_fn = functools.partial(
      gkd.packed_loss,
      policy.model,
      teacher.model,
      beta=0.5,
      temperature=1.0,
      chunk_tokens=rows.chunk_tokens,
      router_aux_coef=0.0,
    )
    frozen = gkd.with_teacher(policy.frozen, teacher)
  step: Any = optimizer_step.make_step(  # Any: a partial of a jitted function.
    loss_fn,
    optimizer,
    frozen=frozen,
    shardings=train_state.shardings(state),
  )
  num_rows = (
    rows.per_device * rows.num_microbatches * sharding.num_row_shards(mesh)
  )
  batch = _batch(num_rows, rows.length)
  mask = jax.ShapeDtypeStruct((num_rows, rows.length), jnp.bool_)
  batch |= {"loss_mask": mask}
  place = sharding.of_batch(mesh)
  batch = train_state.placed(batch, dict.fromkeys(batch, place))
  lowered = step.func.lower(
    *step.args, state, batch, num_microbatches=rows.num_microbatches
  )
  analysis = lowered.compile().memory_analysis()
  return Compiled(analysis.argument_size_in_bytes, analysis.temp_size_in_bytes)


def _logprobs(
  model: decoder.Model,
  rows: Rows,
  params: decoder.Params,
  batch: optimizer_step.Batch,
) -> jax.Array:
  stats = score.token_stats(
    model, params, batch, temperature=1.0, chunk_tokens=rows.chunk_tokens
  )
  return stats.logprobs


def _batch(num_rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
  names = ("token_ids", "positions", "segment_ids")
  shape = (num_rows, length)
  return {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in names}


def _share(
  policy: trainable.Policy,
  build: Build,
  mesh: jax.sharding.Mesh,
  **changes: Any,
) -> _Share:
  """Describes the decoder that one device computes, along the axis `tensor`.

  Args:
    policy: of the whole decoder.
    build: see `of_update`.
    mesh: its axis sizes divide the model's dimensions.
    **changes: arguments of `build`, and `num_layers` to keep fewer layers.
  """
  whole, tensor = policy.base.config, mesh.shape["tensor"]
  num_layers = changes.pop("num_layers", whole.num_layers)
  experts = whole.experts and dataclasses.replace(
    whole.experts, width=whole.experts.width // tensor
  )
  config = dataclasses.replace(
    whole,
    num_layers=num_layers,
    local=whole.local[:num_layers],
    window=whole.window if any(whole.local[:num_layers]) else None,
    num_heads=whole.num_heads // tensor,
    num_kv_heads=whole.num_kv_heads // tensor,
    mlp_width=whole.mlp_width // tensor,
    vocab_size=whole.vocab_size // tensor,
    experts=experts,
  )
  model = build(config, **changes)
  if policy.adapters is None:
    return trainable.full_policy(model), model.abstract_params
  kind = quantized.kind_of(policy.frozen)
  frozen = model.abstract_params
  policy, trained = trainable.split(model, frozen, policy.adapters)
  if kind:  # Dequantization is part of the trace.
    frozen = quantized.describe(frozen, kind)
  return dataclasses.replace(policy, frozen=frozen), trained


def _rows_share(rows: Rows, mesh: jax.sharding.Mesh) -> Rows:
  """Returns the rows of one device: rows are split along the axis `context`."""
  length = -(-rows.length // mesh.shape["context"])
  return dataclasses.replace(rows, length=length)


def _kept(share: _Share, rows: Rows) -> int:
  """Counts the bytes of residuals that the forward pass keeps on a device.

  Parameters are not counted: they are held anyway.
  """
  policy, trained = share

  def backward(frozen: Any, trained: Any, batch: optimizer_step.Batch) -> Any:
    def logprobs(trained: decoder.Params) -> jax.Array:
      return _logprobs(policy.model, rows, lora.join(frozen, trained), batch)

    return jax.vjp(logprobs, trained)[1]

  batch = _batch(rows.per_device, rows.length)
  jaxpr = jax.make_jaxpr(backward)(policy.frozen, trained, batch).jaxpr
  given = set(map(id, jaxpr.invars))
  kept: dict[int, Any] = {  # Any: shaped values.
    id(var): var.aval
    for var in jaxpr.outvars
    if isinstance(var, jax_core.Var) and id(var) not in given
  }
  return sum(
    aval.size * aval.dtype.itemsize
    for aval in kept.values()
    if aval.memory_space != jax.memory.Space.Host
  )


def _head(teacher: gkd.Teacher) -> Any:  # Any: described arrays.
  is_tied = teacher.model.config.tie_embeddings
  return teacher.params["embed" if is_tied else "head"]


def _num_gathered(params: Any, *, num_copies: int) -> int:
  """Counts the bytes of sharded weights after they are gathered.

  Along `tensor` and `expert` they stay sharded: each device computes its share.
  """
  total = 0
  for leaf in jax.tree.leaves(params):
    gathered = [
      axis for axis in leaf.sharding.spec if axis not in ("tensor", "expert")
    ]
    sizes = [leaf.sharding.mesh.shape[a] for a in jax.tree.leaves(gathered)]
    if math.prod(sizes) > 1:
      total += num_copies * math.prod(sizes) * num_bytes(leaf)
  return total
