# SPDX-License-Identifier: Apache-2.0
"""Held-out loss of SFT and GKD, in the microbatches of training."""

from collections.abc import Callable, Iterable
import functools
from typing import Any

import jax
import numpy as np

from atlas_jax.train import optimizer_step

# A batch, how many of its microbatches to compute (None for all), and how many
# it has; see `optimizer_step.accumulate`.
_Part = tuple[optimizer_step.Batch, int | None, int]
# From all parameters and held-out batches to the means of the loss's metrics,
# named `eval/...`.
HeldOutLoss = Callable[[Any, Iterable[_Part]], dict[str, float]]


def make(loss_fn: optimizer_step.LossFn) -> HeldOutLoss:
  """Returns a function that averages a loss's metrics over held-out batches.

  The mean is weighted as in `optimizer_step.make_step`, and the same for any
  number of microbatches. These are evaluated one after another, so evaluation
  needs no more memory for activations than training.
  """

  @functools.partial(jax.jit, static_argnames="num_microbatches")
  def of_batch(
    params: Any,
    batch: optimizer_step.Batch,
    num_used: jax.Array | int | None,
    *,
    num_microbatches: int,
  ) -> tuple[jax.Array, optimizer_step.Metrics]:
    """Returns the weight and the metrics of a batch."""

    def of_microbatch(
      microbatch: optimizer_step.Batch,
    ) -> tuple[Any, jax.Array, optimizer_step.Metrics]:
      _, (weight, metrics) = loss_fn(params, microbatch)
      return (), weight, metrics

    _, weight, metrics = optimizer_step.accumulate(
      of_microbatch, batch, num_used, num_microbatches=num_microbatches
    )
    return weight, metrics

  def held_out_loss(params: Any, parts: Iterable[_Part]) -> dict[str, float]:
    queued = [
      of_batch(params, batch, num_used, num_microbatches=num_microbatches)
      for batch, num_used, num_microbatches in parts
    ]
    weights, means = zip(*jax.device_get(queued), strict=True)
    total = max(float(sum(weights)), 1.0)
    return {
      f"eval/{name}": float(np.dot([m[name] for m in means], weights)) / total
      for name in means[0]
    }

  return held_out_loss
