# SPDX-License-Identifier: Apache-2.0
"""Rollouts as rows of one token batch: the very tokens that were sampled."""

from collections.abc import Sequence

import numpy as np

from atlas_jax import types

_LENGTH_MULTIPLE = 32


def make_batch(
  rollouts: Sequence[types.Rollout],
  advantages_B: np.ndarray,
  *,
  multiple: int,
) -> dict[str, np.ndarray]:
  """Lays rollouts out as rows: the very tokens that were sampled.

  Args:
    rollouts: one per row.
    advantages_B: one per rollout.
    multiple: the number of rows is rounded up to a power of two times this,
      and that of tokens to a multiple of 32, so that few shapes are compiled.
      What is added is padding that counts for nothing.

  Returns:
    `token_ids`, `positions`, `segment_ids` int32[B, T]; `loss_mask` bool[B, T],
    True on the tokens of completions; `rollout_logprobs` float32[B, T];
    `advantages` float32[B].
  """
  rows = [
    (r.prompt.token_ids, r.completion.token_ids, r.completion.logprobs)
    for r in rollouts
  ]
  longest = max(len(p) + len(c) for p, c, _ in rows)
  length = -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
  shape = (_round_up(len(rows), multiple), length)
  batch = {
    "token_ids": np.zeros(shape, np.int32),
    "positions": np.zeros(shape, np.int32),
    "segment_ids": np.zeros(shape, np.int32),
    "loss_mask": np.zeros(shape, bool),
    "rollout_logprobs": np.zeros(shape, np.float32),
    "advantages": np.zeros(shape[:1], np.float32),
  }
  batch["advantages"][: len(rows)] = advantages_B
  for i, (prompt, completion, logprobs) in enumerate(rows):
    start, end = len(prompt), len(prompt) + len(completion)
    batch["token_ids"][i, :end] = (*prompt, *completion)
    batch["positions"][i, :end] = np.arange(end)
    batch["segment_ids"][i, :end] = 1
    batch["loss_mask"][i, start:end] = True
    batch["rollout_logprobs"][i, start:end] = logprobs
  return batch


def _round_up(size: int, multiple: int) -> int:
  """Rounds up to `multiple` times a power of two."""
  while multiple < size:
    multiple *= 2
  return multiple
