# SPDX-License-Identifier: Apache-2.0
"""Messages to token ids and a loss mask, by the tokenizer's own template."""

from collections.abc import Iterator, Sequence
import dataclasses
import hashlib
import json
import os
import pathlib

import jinja2
import transformers

from atlas_jax import errors, types

Tokenizer = transformers.PreTrainedTokenizerBase


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
  """Loads a tokenizer that can render conversations and pad batches.

  Args:
    directory: a local checkpoint, or the id of one on the Hub.

  Raises:
    errors.ConfigError: if there is no usable tokenizer, or it has no chat
      template, no pad token or no end-of-sequence token.
  """
  where = os.fspath(directory)
  try:
    # Left out, it would ask whoever sits there whether to run a model's code.
    tokenizer = transformers.AutoTokenizer.from_pretrained(
      where, trust_remote_code=False
    )
  except (OSError, ValueError, KeyError) as error:
    raise errors.ConfigError(
      "No tokenizer could be loaded.",
      where=where,
      why=_first_line(error),
      fix="Name a folder with tokenizer.json and tokenizer_config.json, or "
      "the Hub id of a checkpoint which this machine can reach.",
    ) from error
  if not tokenizer.chat_template:
    raise errors.ConfigError(
      "The tokenizer has no chat template.",
      where=where,
      why="Base models often ship none; conversations cannot be rendered.",
      fix="Use the instruction-tuned tokenizer of the same family, or put its "
      "chat_template.jinja next to tokenizer_config.json.",
    )
  for name in ("pad_token", "eos_token"):
    if getattr(tokenizer, name) is None:
      raise errors.ConfigError(
        f"The tokenizer has no {name}.",
        where=where,
        why="tokenizer_config.json sets none.",
        fix=f'Add "{name}" to tokenizer_config.json, naming a special token '
        "that is in the vocabulary.",
      )
  return tokenizer


def fingerprint(tokenizer: Tokenizer) -> str:
  """Names a tokenizer by its vocabulary and its chat template."""
  parts = (sorted(tokenizer.get_vocab().items()), tokenizer.chat_template)
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def check_vocabulary(
  tokenizer: Tokenizer, vocab_size: int, directory: str | os.PathLike[str]
) -> None:
  """Refuses a tokenizer that is not the model's.

  Raises:
    errors.ConfigError: if it writes ids that the model does not have.
  """
  # Tokens which were added on top may go unused, as Gemma's for images.
  used = tokenizer.pad_token_id, tokenizer.eos_token_id
  largest = max(
    tokenizer.vocab_size - 1, *(i for i in used if isinstance(i, int))
  )
  if largest >= vocab_size:
    raise errors.ConfigError(
      "The tokenizer is not the model's.",
      where=os.fspath(directory),
      why=f"It writes ids up to {largest}, and config.json has a vocab_size of "
      f"{vocab_size}.",
      fix="Copy the tokenizer's files from the checkpoint that the weights are "
      "of.",
    )


def render(
  tokenizer: Tokenizer, messages: Sequence[types.Message]
) -> tuple[str, tuple[int, ...]]:
  """Renders a prompt up to where the assistant begins to write.

  Returns:
    The text and its token ids.

  Raises:
    errors.DataError: if the template refuses these messages.
  """
  text = _apply_template(tokenizer, messages, add_header=True)
  return text, tuple(_encode(tokenizer, text))


def tokenize(
  tokenizer: Tokenizer, messages: Sequence[types.Message]
) -> tuple[list[int], list[bool]]:
  """Tokenizes a whole conversation and marks what the assistant wrote.

  What a sampler would be given and what it would write are encoded apart, so
  no token spans the border and the first prompt's ids are those of `render`,
  whatever the completion starts with.

  Returns:
    Token ids, and a loss mask that is True exactly on the assistant's tokens
    with the end-of-turn token: not on headers, nor on the newline that ChatML
    puts after a turn.

  Raises:
    errors.DataError: if no turn is the assistant's, the template refuses these
      messages, or it writes an assistant's turn differently once others follow.
    errors.ConfigError: if the template does not close the assistant's turns
      with a special token, or the tokenizer cannot encode a text in parts.
  """
  text = _apply_template(tokenizer, messages, add_header=False)
  token_ids: list[int] = []
  loss_mask: list[bool] = []
  done = 0
  for start, end in _written_spans(tokenizer, messages, text):
    for part, written in ((text[done:start], False), (text[start:end], True)):
      part_ids = _encode(tokenizer, part)
      token_ids += part_ids
      loss_mask += [written] * len(part_ids)
    done = end
  tail_ids = _encode(tokenizer, text[done:])
  token_ids += tail_ids
  loss_mask += [False] * len(tail_ids)
  _check_parts(tokenizer, text, token_ids)
  return token_ids, loss_mask


def stop_token_ids(
  tokenizer: Tokenizer, directory: str | os.PathLike[str]
) -> tuple[int, ...]:
  """Returns the ids that end a completion, sorted.

  They are the tokenizer's end-of-sequence token and those which the
  checkpoint's generation_config.json names, if `directory` holds one.

  Raises:
    errors.ConfigError: if that file cannot be read.
  """
  path = pathlib.Path(directory) / "generation_config.json"
  try:
    named = json.loads(path.read_text("utf-8")).get("eos_token_id")
  except FileNotFoundError:
    named = None
  except (OSError, ValueError, AttributeError) as error:
    raise _bad_generation_config(path, _first_line(error)) from error
  ids: set[int] = set()
  listed = named if isinstance(named, list) else [named]
  for token_id in (tokenizer.eos_token_id, *listed):
    if isinstance(token_id, int) and not isinstance(token_id, bool):
      ids.add(token_id)
    elif token_id is not None:
      raise _bad_generation_config(path, f"{token_id!r} is no token id.")
  return tuple(sorted(ids))


def decode(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
  """Returns the text of `token_ids`, without special tokens."""
  texts = tokenizer.batch_decode(
    [list(token_ids)],
    skip_special_tokens=True,
    clean_up_tokenization_spaces=False,
  )
  return texts[0]


def _written_spans(
  tokenizer: Tokenizer, messages: Sequence[types.Message], text: str
) -> Iterator[tuple[int, int]]:
  """Yields where in `text` the assistant wrote, end-of-turn token included."""
  turns = [i for i, turn in enumerate(messages) if turn.role == "assistant"]
  if not turns:
    raise _bad_conversation(
      messages,
      why="No turn is the assistant's, so there is nothing to learn.",
      fix="Give the row an answer, or leave it out.",
    )
  for i in turns:
    header = _apply_template(tokenizer, messages[:i], add_header=True)
    turn = _apply_template(tokenizer, messages[: i + 1], add_header=False)
    specials = _special_tokens(tokenizer)
    if not (turn.startswith(header) and text.startswith(turn)):
      yield len(header), _end_in_text(messages, i, header, text, specials)
      continue
    end = len(turn.rstrip())
    if not turn.endswith(specials, len(header), end):
      raise _bad_template(turn, "It closes no turn with a special token.")
    if turn.startswith(specials, len(header)) and header == _apply_template(
      tokenizer, messages[:i], add_header=False
    ):
      raise _bad_template(turn, "It ignores add_generation_prompt.")
    yield len(header), end


def _end_in_text(
  messages: Sequence[types.Message],
  turn: int,
  header: str,
  text: str,
  specials: Sequence[str],
) -> int:
  """Finds where a turn ends which the template would end differently if last.

  Qwen3's gives the last turn an empty thinking block, and takes the thinking
  out of earlier ones: such a turn cannot be trained, since what was written is
  nowhere in `text`.
  """
  content = messages[turn].content
  for written in (content, content.strip()):
    for closing in specials:
      told = header + written + closing
      if text.startswith(told):
        return len(told)
  raise _bad_conversation(
    messages,
    why=f"The chat template writes turn {turn + 1}, the assistant's, in one "
    "way to generate it and in another to read it back.",
    fix="Split the conversation into rows that end with their only assistant "
    "turn, or change the template.",
  )


def _check_parts(tokenizer: Tokenizer, text: str, token_ids: list[int]) -> None:
  """Refuses tokenizers which add characters to each text they encode."""
  whole = _encode(tokenizer, text)
  if whole != token_ids and tokenizer.decode(whole) != tokenizer.decode(
    token_ids
  ):
    raise errors.ConfigError(
      "The tokenizer cannot encode a conversation in parts.",
      where=repr(text[:80]),
      why="It adds characters, often a space, in front of every text.",
      fix="Use a tokenizer without a prefix space (add_prefix_space, "
      "add_dummy_prefix or legacy set to false).",
    )


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
  # The template has written the special tokens, a leading one included.
  return tokenizer.encode(text, add_special_tokens=False)


def _special_tokens(tokenizer: Tokenizer) -> tuple[str, ...]:
  added = tokenizer.added_tokens_decoder.values()
  return tuple(token.content for token in added if token.special)


def _apply_template(
  tokenizer: Tokenizer, messages: Sequence[types.Message], *, add_header: bool
) -> str:
  """Renders messages, and the header of an assistant's turn if asked to."""
  try:
    text = tokenizer.apply_chat_template(
      [dataclasses.asdict(message) for message in messages],
      tokenize=False,
      add_generation_prompt=add_header,
    )
  except (jinja2.TemplateError, ValueError, TypeError) as error:
    raise _bad_conversation(
      messages,
      why=f"The chat template refuses it: {_first_line(error)}",
      fix="Write the turns as the model expects them, often an optional "
      "system turn, then user and assistant in turn.",
    ) from error
  return str(text)


def _bad_conversation(
  messages: Sequence[types.Message], *, why: str, fix: str
) -> errors.DataError:
  first = repr(messages[0].content[:60]) if messages else "no turn"
  return errors.DataError(
    "A conversation cannot be rendered.",
    where=f"{len(messages)} turns, beginning with {first}",
    why=why,
    fix=fix,
  )


def _bad_template(turn: str, why: str) -> errors.ConfigError:
  return errors.ConfigError(
    "The chat template cannot be trained with.",
    where=f"the end of what it wrote: {turn[-80:]!r}",
    why=why,
    fix="Use the template of an instruction-tuned model of this family.",
  )


def _bad_generation_config(path: pathlib.Path, why: str) -> errors.ConfigError:
  return errors.ConfigError(
    "The stop tokens cannot be read.",
    where=str(path),
    why=why,
    fix="Set eos_token_id to a token id or a list of them, or delete the file.",
  )


def _first_line(error: Exception) -> str:
  return f"{type(error).__name__}: {error}".splitlines()[0]
