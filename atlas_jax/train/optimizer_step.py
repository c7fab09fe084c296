# SPDX-License-Identifier: Apache-2.0
"""The optimizer update: accumulate gradients over microbatches, and apply."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from atlas_jax.models import lora
from atlas_jax.train import train_state

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
# From all parameters and a batch to the mean loss, its weight (the number of
# tokens or sequences averaged over) and metrics, means of the same weight.
LossFn = Callable[[Any, Batch], tuple[jax.Array, tuple[jax.Array, Metrics]]]


class Step(Protocol):
  """The type of `make_step`'s result."""

  def __call__(
    self,
    state: train_state.TrainState,
    batch: Batch,
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
    A function from state and batch to the new state and metrics. It splits the
    rows into `num_microbatches` parts and accumulates their gradients. Metrics
    are weighted means over the parts, but maxima where `is_max`.
  """
  optimizer = optax.with_extra_args_support(optimizer)

  def step(
    frozen: Mapping[str, Any],
    state: train_state.TrainState,
    batch: Batch,
    *,
    num_microbatches: int = 1,
  ) -> tuple[train_state.TrainState, Metrics]:
    def weighted(params: Any, batch: Batch) -> tuple[jax.Array, Any]:
      loss, (weight, metrics) = loss_fn(lora.join(frozen, params), batch)
      return loss * weight, (weight, metrics)

    def grad_fn(params: Any, batch: Batch) -> tuple[Any, Any]:
      grads, aux = jax.grad(weighted, has_aux=True)(params, batch)
      # Those of bfloat16 parameters are too, and would be summed as such.
      return optax.tree.cast(grads, jnp.float32), aux

    grads, metrics = _accumulate(grad_fn, state.params, batch, num_microbatches)
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


def split(batch: Batch, num_microbatches: int) -> Batch:
  """Splits rows into microbatches, along a new first axis.

  Row i goes to microbatch i % n, so that no row moves to another device: rows
  are sharded in contiguous blocks.
  """

  def split_rows(x: jax.Array) -> jax.Array:
    x = x.reshape(-1, num_microbatches, *x.shape[1:])
    return jnp.moveaxis(x, 1, 0)

  return {name: split_rows(x) for name, x in batch.items()}


def held_out(
  loss_fn: LossFn, params: Any, batches: Iterable[Batch]
) -> dict[str, float]:
  """Computes the weighted mean of a loss's metrics over held-out batches.

  Args:
    loss_fn: the loss, jitted.
    params: all parameters.
    batches: the held-out data.

  Returns:
    The means, with names prefixed by `eval/`.
  """
  queued = [loss_fn(params, batch)[1] for batch in batches]
  weights, means = zip(*jax.device_get(queued), strict=True)
  total = max(float(sum(weights)), 1.0)
  return {
    f"eval/{name}": float(np.dot([m[name] for m in means], weights)) / total
    for name in means[0]
  }


def is_max(name: str) -> bool:
  """Returns whether a metric is a maximum (of values >= 0): `ratio_max`."""
  return name.endswith("_max")


def combine(name: str, values: Sequence[Any]) -> Any:  # Any: scalars.
  """Returns the maximum of a metric that is one, else the mean of a metric."""
  return max(values) if is_max(name) else sum(values) / len(values)


def _accumulate(
  grad_fn: Callable[..., Any],
  params: Any,
  batch: Batch,
  num_microbatches: int,
) -> tuple[Any, Metrics]:
  """Combines gradients and metrics of microbatches, as `make_step` defines."""

  def weighted(microbatch: Batch) -> tuple[Any, jax.Array, Metrics, Metrics]:
    grads, (weight, metrics) = grad_fn(params, microbatch)
    means = {k: v * weight for k, v in metrics.items() if not is_max(k)}
    maxima = {k: v for k, v in metrics.items() if is_max(k)}
    return grads, weight, means, maxima

  if num_microbatches == 1:
    grads, weight, means, maxima = weighted(batch)
  else:
    microbatches = split(batch, num_microbatches)
    zeros = jax.tree.map(
      lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
      jax.eval_shape(weighted, {k: v[0] for k, v in microbatches.items()}),
    )

    def add(total: Any, microbatch: Batch) -> tuple[Any, None]:
      *sums, maxima = total
      *parts, highest = weighted(microbatch)
      sums = jax.tree.map(jnp.add, sums, parts)
      return (*sums, jax.tree.map(jnp.maximum, maxima, highest)), None

    (grads, weight, means, maxima), _ = jax.lax.scan(add, zeros, microbatches)
  weight = jnp.maximum(weight, 1)
  grads = jax.tree.map(lambda leaf: leaf / weight, grads)
  return grads, {k: v / weight for k, v in means.items()} | maxima
