# SPDX-License-Identifier: Apache-2.0
"""Held-out loss of SFT and GKD, in the microbatches of training."""

from collections.abc import Callable, Iterable
import functools
from typing import Any

import jax
import numpy as np

from atlas_jax.train import optimizer_step

# From all parameters and held-out batches, each with its number of
# microbatches, to the means of the loss's metrics, named `eval/...`.
HeldOutLoss = Callable[
  [Any, Iterable[tuple[optimizer_step.Batch, int]]], dict[str, float]
]


def make(loss_fn: optimizer_step.LossFn) -> HeldOutLoss:
  """Returns a function that averages a loss's metrics over held-out batches.

  The mean is weighted as in `optimizer_step.make_step`, and the same for any
  number of microbatches. These are evaluated one after another, so evaluation
  needs no more memory for activations than training.
  """

  @functools.partial(jax.jit, static_argnames="num_microbatches")
  def of_batch(
    params: Any, batch: optimizer_step.Batch, *, num_microbatches: int
  ) -> tuple[jax.Array, optimizer_step.Metrics]:
    """Returns weights [M] and metrics [M] of the microbatches."""
    return jax.lax.map(
      lambda microbatch: loss_fn(params, microbatch)[1],
      optimizer_step.split(batch, num_microbatches),
    )

  def held_out_loss(
    params: Any, batches: Iterable[tuple[optimizer_step.Batch, int]]
  ) -> dict[str, float]:
    queued = [
      of_batch(params, batch, num_microbatches=num_microbatches)
      for batch, num_microbatches in batches
    ]
    weights, metrics = zip(*jax.device_get(queued), strict=True)
    weights_M = np.concatenate(weights)
    total = max(float(weights_M.sum()), 1.0)
    return {
      f"eval/{name}": float(
        np.concatenate([each[name] for each in metrics]) @ weights_M
      )
      / total
      for name in metrics[0]
    }

  return held_out_loss
