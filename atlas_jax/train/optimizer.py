# SPDX-License-Identifier: Apache-2.0
"""The optimizer: AdamW with a schedule, clipping and a decay mask."""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import optax

from atlas_jax import errors

Schedule = Literal["cosine", "constant"]


def make_schedule(
  *,
  learning_rate: float,
  schedule: Schedule,
  warmup_fraction: float,
  num_updates: int,
) -> optax.Schedule:
  """Makes the learning rate as a function of updates done.

  It rises linearly over the first `warmup_fraction` of all updates, then stays
  or falls to zero along half a cosine.

  Source: Loshchilov and Hutter, arXiv:1608.03983, for the cosine.

  Raises:
    errors.ConfigError: if there is no schedule of that name.
  """
  num_warmup = round(warmup_fraction * num_updates)
  if schedule == "cosine":
    rest = optax.cosine_decay_schedule(
      learning_rate, max(1, num_updates - num_warmup)
    )
  elif schedule == "constant":
    rest = optax.constant_schedule(learning_rate)
  else:
    raise errors.ConfigError(
      f"There is no schedule {schedule!r}.",
      where="--config.schedule.schedule",
      why="The schedules are 'cosine' and 'constant'.",
      fix="Name one of them.",
    )
  # The first update is not lost on a rate of zero.
  warmup = optax.linear_schedule(
    learning_rate / max(1, num_warmup), learning_rate, max(1, num_warmup - 1)
  )
  return optax.join_schedules([warmup, rest], [num_warmup])


def make_optimizer(
  schedule: optax.Schedule,
  *,
  weight_decay: float,
  beta1: float,
  beta2: float,
  epsilon: float,
  max_grad_norm: float,
) -> optax.GradientTransformation:
  """Clips by global norm, then applies AdamW.

  Norm scales and biases are not decayed.

  Source: Loshchilov and Hutter, arXiv:1711.05101.
  """
  return optax.chain(
    optax.clip_by_global_norm(max_grad_norm),
    optax.adamw(
      schedule,
      b1=beta1,
      b2=beta2,
      eps=epsilon,
      weight_decay=weight_decay,
      mask=_decayed,
    ),
  )


def _decayed(params: Mapping[str, Any]) -> Any:  # Any: mirrors the tree.
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key not in ("scale", "bias"), params
  )
