# SPDX-License-Identifier: Apache-2.0
"""What a model thinks of given tokens: where models meet losses."""

from collections.abc import Mapping

import jax

from atlas_jax.losses import logprobs
from atlas_jax.models import decoder


def token_stats(
  model: decoder.Model,
  params: decoder.Params,
  batch: Mapping[str, jax.Array],
  *,
  temperature: float,
  chunk_size: int,
) -> logprobs.TokenStats:
  """Scores every token but the first of each row.

  Args:
    model: the decoder.
    params: its parameters.
    batch: `token_ids`, `positions` and `segment_ids`, int32[B, T]. The first
      token of a packed segment is scored as well; its mask must leave it out.
    temperature: divides the logits.
    chunk_size: tokens whose logits exist at one time.

  Returns:
    Statistics [B, T - 1] of `token_ids[:, 1:]`.
  """
  hidden_BTD = model.hidden(
    params, batch["token_ids"], batch["positions"], batch["segment_ids"]
  )
  return logprobs.of_targets(
    hidden_BTD[:, :-1],
    model.head(params),
    batch["token_ids"][:, 1:],
    temperature=temperature,
    chunk_size=chunk_size,
  )
