# SPDX-License-Identifier: Apache-2.0
"""Rollouts as rows of one token batch: the very tokens that were sampled."""

from collections.abc import Sequence

import numpy as np

from atlas_jax import types

_LENGTH_MULTIPLE = 32


def make_batch(
  rollouts: Sequence[types.Rollout], *, multiple: int
) -> dict[str, np.ndarray]:
  """Lays rollouts out as rows: the very tokens that were sampled.

  Args:
    rollouts: one per row.
    multiple: the number of rows is rounded up to a power of two times this,
      and that of tokens to a multiple of 32, so that few shapes are compiled.
      What is added is padding that counts for nothing.

  Returns:
    `token_ids`, `positions`, `segment_ids` int32[B, T]; `loss_mask` bool[B, T],
    True on the tokens of completions; `rollout_logprobs` float32[B, T].
  """
  batch = make_tokens(
    [(r.prompt.token_ids, r.completion.token_ids) for r in rollouts],
    multiple=multiple,
  )
  batch["rollout_logprobs"] = np.zeros(batch["token_ids"].shape, np.float32)
  for i, rollout in enumerate(rollouts):
    start = len(rollout.prompt.token_ids)
    logprobs = rollout.completion.logprobs
    batch["rollout_logprobs"][i, start : start + len(logprobs)] = logprobs
  return batch


def make_tokens(
  pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, multiple: int
) -> dict[str, np.ndarray]:
  """Lays prompts and their completions out as rows; see `make_batch`."""
  longest = max(len(prompt) + len(completion) for prompt, completion in pairs)
  length = -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
  shape = (_round_up(len(pairs), multiple), length)
  batch = {
    "token_ids": np.zeros(shape, np.int32),
    "positions": np.zeros(shape, np.int32),
    "segment_ids": np.zeros(shape, np.int32),
    "loss_mask": np.zeros(shape, bool),
  }
  for i, (prompt, completion) in enumerate(pairs):
    start, end = len(prompt), len(prompt) + len(completion)
    batch["token_ids"][i, :end] = (*prompt, *completion)
    batch["positions"][i, :end] = np.arange(end)
    batch["segment_ids"][i, :end] = 1
    batch["loss_mask"][i, start:end] = True
  return batch


def _round_up(size: int, multiple: int) -> int:
  """Rounds up to `multiple` times a power of two."""
  while multiple < size:
    multiple *= 2
  return multiple
