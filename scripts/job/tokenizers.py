# SPDX-License-Identifier: Apache-2.0
"""Opens the tokenizer of a model section."""

import pathlib

from atlas_jax import chat, errors, types

_TURNS = (types.Message("user", "q"), types.Message("assistant", "a"))


def open_tokenizer(
  directory: pathlib.Path, *, chat_template: str, chat_template_kwargs: str
) -> chat.Tokenizer:
  """Loads a tokenizer, with a chat template that replaces its own if set.

  Args:
    directory: of the model.
    chat_template: see `chat.load_tokenizer`.
    chat_template_kwargs: `template_kwargs` of `chat.load_tokenizer`.

  Raises:
    errors.AtlasError: if the tokenizer or the template is invalid, or the
      template ends turns with a token at which samplers do not stop.
  """
  tokenizer = chat.load_tokenizer(
    directory,
    chat_template=chat_template,
    template_kwargs=chat_template_kwargs,
  )
  if not chat_template:
    return tokenizer
  token_ids, loss_mask = chat.tokenize(tokenizer, _TURNS)
  last = [i for i, on in zip(token_ids, loss_mask, strict=True) if on][-1]
  stops = chat.stop_token_ids(tokenizer, directory)
  if last not in stops:
    raise errors.ConfigError(
      f"The chat template ends turns with {tokenizer.decode([last])!r}, at "
      "which samplers do not stop.",
      where=f"--config.model.chat_template={chat_template}",
      why=f"They stop at {', '.join(map(repr, map(tokenizer.decode, stops)))}: "
      f"eos_token of the tokenizer, and generation_config.json.",
      fix="End turns with {{ eos_token }} in the template, or add the token's "
      f"id, {last}, to eos_token_id in generation_config.json of {directory}.",
    )
  return tokenizer
