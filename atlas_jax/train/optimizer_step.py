# SPDX-License-Identifier: Apache-2.0
"""The optimizer update: accumulate gradients over microbatches, and apply."""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from atlas_jax.losses import reduce
from atlas_jax.models import lora
from atlas_jax.train import train_state

# Arrays of rows; and under `completions` arrays of completions, or nothing.
Batch = Mapping[str, Any]  # Any: arrays, or a dict of them.
# Means of the same weight as the loss, or `reduce.Mean`s of their own weight.
Metrics = dict[str, Any]
# From all parameters and a microbatch to the mean loss, its weight (the number
# of tokens or sequences averaged over) and metrics.
LossFn = Callable[[Any, Batch], tuple[jax.Array, tuple[jax.Array, Metrics]]]


class Step(Protocol):
  """The type of `make_step`'s result."""

  def __call__(
    self,
    state: train_state.TrainState,
    batch: Batch,
    num_used: int | None = None,
    *,
    num_microbatches: int = 1,
  ) -> tuple[train_state.TrainState, Metrics]:
    """Returns the new state and metrics; donates the old state."""
    ...


def make_step(
  loss_fn: LossFn,
  optimizer: optax.GradientTransformation,
  *,
  frozen: Mapping[str, Any],  # Any: nested dicts with arrays as leaves.
  shardings: Any,  # Any: a tree like the state's.
) -> Step:
  """Returns the jitted update; it donates the state.

  The loss is the mean over the whole batch for any number of microbatches:
  sum_m weight_m loss_m / sum_m weight_m. An update with a non-finite loss or
  gradient is skipped and counted.

  Args:
    loss_fn: the mean loss of a batch, with its weight.
    optimizer: the optimizer, including clipping. Its `update` gets the number
      of steps done, `step`, if it takes extra arguments.
    frozen: parameters outside the state; they have no gradients and no
      optimizer state. `loss_fn` receives `lora.join(frozen, state.params)`.
    shardings: the state's shardings, from `train_state.shardings`. Without them
      the compiler may reshard the state after the first update, and a resumed
      run would compile a different program.

  Returns:
    A function from state and batch to the new state and metrics. Gradients and
    metrics are accumulated as in `accumulate`. One program is compiled for all
    values of `num_used`.
  """
  optimizer = optax.with_extra_args_support(optimizer)

  def step(
    frozen: Mapping[str, Any],
    state: train_state.TrainState,
    batch: Batch,
    num_used: jax.Array | None = None,
    *,
    num_microbatches: int = 1,
  ) -> tuple[train_state.TrainState, Metrics]:
    def weighted(params: Any, batch: Batch) -> tuple[jax.Array, Any]:
      loss, (weight, metrics) = loss_fn(lora.join(frozen, params), batch)
      return loss * weight, (weight, metrics)

    def of_microbatch(microbatch: Batch) -> tuple[Any, jax.Array, Metrics]:
      grad_fn = jax.grad(weighted, has_aux=True)
      grads, (weight, metrics) = grad_fn(state.params, microbatch)
      # Those of bfloat16 parameters are too, and would be summed as such.
      return optax.tree.cast(grads, jnp.float32), weight, metrics

    grads, weight, metrics = accumulate(
      of_microbatch, batch, num_used, num_microbatches=num_microbatches
    )
    grads = jax.tree.map(lambda leaf: leaf / jnp.maximum(weight, 1), grads)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(grad_norm) & jnp.isfinite(metrics["loss"])
    old_opt_state = train_state.on_device(state.opt_state)

    def apply() -> tuple[Any, Any]:
      updates, opt_state = optimizer.update(
        grads, old_opt_state, state.params, step=state.step
      )
      return optax.apply_updates(state.params, updates), opt_state

    params, opt_state = jax.lax.cond(
      finite, apply, lambda: (state.params, old_opt_state)
    )
    num_nonfinite = jnp.where(finite, 0, state.num_nonfinite + 1)
    metrics |= {"grad_norm": grad_norm, "num_nonfinite": num_nonfinite}
    new = state._replace(
      params=params, opt_state=opt_state, num_nonfinite=num_nonfinite
    )
    return new, metrics

  jitted = jax.jit(
    step,
    static_argnames="num_microbatches",
    donate_argnums=1,
    out_shardings=(shardings, None),
  )
  return functools.partial(jitted, frozen)


def accumulate(
  fn: Callable[[Batch], tuple[Any, jax.Array, Metrics]],
  batch: Batch,
  num_used: jax.Array | int | None = None,
  *,
  num_microbatches: int,
) -> tuple[Any, jax.Array, dict[str, jax.Array]]:
  """Adds up the results of microbatches, computed one after the other.

  Args:
    fn: from a microbatch to a tree of sums, a weight and metrics. Row r of the
      batch is in microbatch r % num_microbatches, so that no row moves to
      another device: rows are sharded in contiguous blocks. Completions are in
      all microbatches, and `index` is the number of the microbatch.
    batch: with rows for every microbatch.
    num_used: how many microbatches to compute, from the first; None for all.
    num_microbatches: see above.

  Returns:
    The sums, the sum of the weights, and metrics: weighted means over the
    microbatches, but maxima where `is_max`.
  """

  def take(index: jax.Array | int, x: jax.Array) -> jax.Array:
    x = x.reshape(-1, num_microbatches, *x.shape[1:])
    return jax.lax.dynamic_index_in_dim(x, index, axis=1, keepdims=False)

  def compute(index: jax.Array | int) -> tuple[Any, Metrics]:
    rows = {k: take(index, x) for k, x in batch.items() if k != "completions"}
    sums, weight, metrics = fn({**batch, **rows, "index": index})
    maxima = {k: v for k, v in metrics.items() if is_max(k)}
    means = {
      k: v if isinstance(v, reduce.Mean) else reduce.Mean(v * weight, weight)
      for k, v in metrics.items()
      if k not in maxima
    }
    return (sums, weight, means), maxima

  def add(index: jax.Array, total: tuple[Any, Metrics]) -> tuple[Any, Metrics]:
    sums, maxima = compute(index)
    sums = jax.tree.map(jnp.add, total[0], sums)
    return sums, jax.tree.map(jnp.maximum, total[1], maxima)

  if num_microbatches == 1:
    total = compute(0)
  else:
    last = num_microbatches if num_used is None else num_used
    shapes = jax.eval_shape(compute, 0)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total = jax.lax.fori_loop(0, last, add, zeros)
  (sums, weight, means), maxima = total
  return sums, weight, {k: v.mean for k, v in means.items()} | maxima


def is_max(name: str) -> bool:
  """Returns whether a metric is a maximum (of values >= 0): `ratio_max`."""
  return name.endswith("_max")


def combine(name: str, values: Sequence[Any]) -> Any:  # Any: scalars.
  """Returns the maximum of a metric that is one, else the mean of a metric."""
  return max(values) if is_max(name) else sum(values) / len(values)
