# SPDX-License-Identifier: Apache-2.0
"""Prompts with the completions that the data has for them."""

from collections.abc import Sequence
import hashlib
from typing import NamedTuple

import numpy as np

from atlas_jax import errors
from atlas_jax.data import loader, packing


class Pair(NamedTuple):
  """A prompt and its completion, token ids; `row_id` names them."""

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
  """Splits a conversation before the last turn that the loss mask marks.

  Args:
    example: token ids and loss mask, see `packing.pack`.
    length: of the longest prompt with its completion.
    max_new_tokens: that may be sampled after the prompt, within that length.
    too_long: what becomes of one that is longer. A prompt is never cut.

  Returns:
    The token ids of prompt and completion, and how many of them the prompt has;
    None if it is left out.

  Raises:
    errors.DataError: if it is too long and that is an error.
    ValueError: if the mask marks nothing.
  """
  token_ids, loss_mask = map(np.asarray, example)
  marked = np.flatnonzero(loss_mask)
  if not len(marked):
    raise ValueError("Expected a loss mask that marks a token.")
  end = int(marked[-1]) + 1
  unmarked = np.flatnonzero(~loss_mask[:end])
  start = int(unmarked[-1]) + 1 if len(unmarked) else 0
  has_room = start + max(max_new_tokens, 1) <= length
  if has_room and end <= length:
    return token_ids[:end], start
  if too_long == "truncate" and has_room:
    return token_ids[:length], start
  if too_long == "error":
    raise errors.DataError(
      "A prompt with its completion is longer than a row.",
      where=f"a conversation of {len(token_ids)} tokens",
      why=f"Its prompt has {start} tokens, its completion {end - start}, what "
      f"may be sampled {max_new_tokens}, and a row {length}.",
      fix="Set --config.packing.too_long=drop, or --config.packing.length to "
      "more.",
    )
  return None


class PairLoader:
  """Shuffled batches of pairs, by the same rule as `loader.Loader`'s.

  `num_prompt_tokens` and `num_completion_tokens` are those of every pair, one
  set after the other.
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
    """Takes pairs as `split` gives them.

    Args:
      pairs: of all sets, one set after the other.
      names: of the rows they are from, for a user to find them by.
      mix: which of them belong to which set, and their order.
      batch_size: pairs of a batch.
      remainder: see `loader.Loader`; a batch that is filled up has fewer.

    Raises:
      errors.DataError: if there are too few to make a batch.
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
      if size:  # Others fill up a batch.
        prompt, completion = token_ids[:num_prompt], token_ids[num_prompt:]
        found.append(Pair(str(number), prompt, completion))
    return found

  def row_names(self, step: int) -> list[str]:
    """Names the rows of the batch of `step`."""
    return self._loader.row_names(step)

  def fingerprint(self) -> str:
    """Returns a digest of all batches, as `loader.Loader.fingerprint`."""
    digest = hashlib.sha256(self._loader.fingerprint().encode())
    digest.update(np.ascontiguousarray(self._token_ids).data)
    return digest.hexdigest()
