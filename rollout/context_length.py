# SPDX-License-Identifier: Apache-2.0
"""Checks that prompts and their completions fit the model's context."""

from collections.abc import Sequence

from atlas_jax import errors, types


def fits(num_prompt_tokens: int, max_new_tokens: int, limit: int) -> bool:
  """Returns whether a non-empty prompt plus its completion fit the context."""
  return 0 < num_prompt_tokens <= limit - max_new_tokens


def check(
  prompts: Sequence[types.Prompt],
  max_new_tokens: int,
  limit: int,
  *,
  limit_name: str,
) -> None:
  """Validates that every prompt plus its completion fit the context.

  Raises:
    errors.ConfigError: for the first prompt that is empty or too long;
      `limit_name` says what `limit` is.
  """
  for prompt in prompts:
    num_tokens = len(prompt.token_ids)
    if not fits(num_tokens, max_new_tokens, limit):
      raise errors.ConfigError(
        f"A prompt must have 1 to {limit - max_new_tokens} tokens, got "
        f"{num_tokens}.",
        where=f"row {prompt.row_id}",
        why=f"{limit_name} is {limit}, of which max_completion_tokens takes "
        f"{max_new_tokens}.",
        fix="Shorten the prompt, lower max_completion_tokens, or raise the "
        "limit if the model allows it.",
      )
