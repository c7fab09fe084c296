# SPDX-License-Identifier: Apache-2.0
"""Prompts with the completions of the dataset."""

from collections.abc import Sequence
import hashlib
from typing import NamedTuple

import numpy as np

from atlas_jax import errors
from atlas_jax.data import loader, packing


class Pair(NamedTuple):
  """Token ids of a prompt and its completion, with a `row_id`."""

  row_id: str
  prompt: np.ndarray
  completion: np.ndarray


def split(
  example: packing.Example,
  *,
  length: int,
  max_new_tokens: int,
  too_long: packing.TooLong,
) -> tuple[np.ndarray, int] | None:
  """Splits a conversation before the last turn marked by the loss mask.

    token ids  p p p p p c c c      prompt p, completion c
    loss mask  . . x x . x x x      start = 5, end = 8

  Args:
    example: token ids and loss mask; see `packing.pack`.
    length: maximum length of a prompt with its completion.
    max_new_tokens: tokens that may be sampled after the prompt; these must fit
      into `length` as well.
    too_long: how to handle longer ones. Prompts are never truncated.

  Returns:
    The token ids of prompt and completion, and the length of the prompt; None
    if the example is dropped.

  Raises:
    errors.DataError: if it is too long and `too_long` is "error".
    ValueError: if the loss mask marks no token.
  """
  token_ids, loss_mask = map(np.asarray, example)
  start, end = last_turn(loss_mask)
  has_room = start + max(max_new_tokens, 1) <= length
  if has_room and end <= length:
    return token_ids[:end], start
  if too_long == "truncate" and has_room:
    return token_ids[:length], start
  if too_long == "error":
    raise errors.DataError(
      "A prompt with its completion is longer than a row.",
      where=f"a conversation of {len(token_ids)} tokens",
      why=f"The prompt has {start} tokens, the completion {end - start}, "
      f"sampled completions up to {max_new_tokens}, and a row {length}.",
      fix="Set --config.packing.too_long=drop, or increase "
      "--config.packing.length.",
    )
  return None


def last_turn(loss_mask: np.ndarray) -> tuple[int, int]:
  """Returns start and end of the last turn marked by a loss mask.

  Raises:
    ValueError: if the loss mask marks no token.
  """
  marked = np.flatnonzero(loss_mask)
  if not len(marked):
    raise ValueError("The loss mask must mark at least one token.")
  end = int(marked[-1]) + 1
  unmarked = np.flatnonzero(~loss_mask[:end])
  return int(unmarked[-1]) + 1 if len(unmarked) else 0, end


class PairLoader:
  """Shuffled batches of pairs, in the order defined for `loader.Loader`.

  `num_prompt_tokens` and `num_completion_tokens` hold the lengths of all pairs,
  over the concatenated datasets.
  """

  def __init__(
    self,
    pairs: Sequence[tuple[np.ndarray, int]],
    *,
    names: Sequence[str],
    mix: loader.Mix,
    batch_size: int,
    remainder: loader.Remainder,
  ) -> None:
    """Initializes the loader with pairs as returned by `split`.

    Args:
      pairs: of all datasets, concatenated.
      names: of their rows, shown to the user to locate them.
      mix: the datasets that the pairs belong to, and their order.
      batch_size: pairs of a batch.
      remainder: see `loader.Loader`; a padded batch has fewer pairs.
    """
    sizes = np.asarray([len(token_ids) for token_ids, _ in pairs])
    self.num_prompt_tokens = np.asarray([start for _, start in pairs])
    self.num_completion_tokens = sizes - self.num_prompt_tokens
    self._token_ids = np.concatenate([token_ids for token_ids, _ in pairs])
    self._loader = loader.Loader(
      {
        "number": np.arange(len(pairs)),
        "end": np.cumsum(sizes),
        "size": sizes,
        "num_prompt": self.num_prompt_tokens,
      },
      names=names,
      mix=mix,
      batch_size=batch_size,
      remainder=remainder,
      share=loader.WHOLE,
    )

  @property
  def num_batches_per_epoch(self) -> int:
    """See `loader.Loader`."""
    return self._loader.num_batches_per_epoch

  def batch(self, step: int) -> list[Pair]:
    """Returns the pairs of the batch of `step`."""
    places = self._loader.batch(step)
    found = []
    for number, end, size, num_prompt in zip(*places.values(), strict=True):
      token_ids = self._token_ids[end - size : end]
      if size:  # Size 0 pads the batch.
        prompt, completion = token_ids[:num_prompt], token_ids[num_prompt:]
        found.append(Pair(str(number), prompt, completion))
    return found

  def row_names(self, step: int) -> list[str]:
    """Returns the names of the rows in the batch of `step`."""
    return self._loader.row_names(step)

  def fingerprint(self) -> str:
    """Returns a digest of all batches; see `loader.Loader.fingerprint`."""
    digest = hashlib.sha256(self._loader.fingerprint().encode())
    digest.update(np.ascontiguousarray(self._token_ids).data)
    return digest.hexdigest()
