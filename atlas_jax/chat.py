# SPDX-License-Identifier: Apache-2.0
"""Converts messages to token ids and a loss mask with the chat template."""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import re
from typing import Any

import jinja2
import transformers

from atlas_jax import errors, types

Tokenizer = transformers.PreTrainedTokenizerBase

_OPEN = r"<(think(?:ing)?)>"
_THINKING = re.compile(rf"{_OPEN}.*?(?:</\1>|\Z)", re.DOTALL)
_THINKING_END = re.compile(r"</think(?:ing)?>")
_OPENED = re.compile(rf"{_OPEN}\s*\Z")
_THINKING_TAGS = {"<think>", "</think>", "<thinking>", "</thinking>"}
_VARIABLE = re.compile(r"[A-Za-z_]\w*")


# Turns end with the end-of-sequence token, which every sampler stops at.
_TEMPLATES = {
  "chatml": (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
  ),
  "none": (
    "{% for message in messages %}{{ message.content }}"
    "{{ eos_token if message.role == 'assistant' else '\n' }}{% endfor %}"
  ),
}


def load_tokenizer(
  directory: str | os.PathLike[str],
  *,
  chat_template: str = "",
  template_kwargs: str = "",
  with_template: bool = True,
) -> Tokenizer:
  """Loads a tokenizer that can render conversations.

  Args:
    directory: a local checkpoint, or a Hub id.
    chat_template: replaces that of the directory: a file with a Jinja template,
      "chatml", or "none" for the texts of the turns without headers; empty for
      the directory's. The latter two end turns with the end-of-sequence token.
    template_kwargs: defaults of variables of the chat template, as a JSON
      object, e.g. '{"enable_thinking": false}'; empty for none. They become
      part of the template, so exports and fingerprints include them.
    with_template: whether a tokenizer without a chat template is an error.

  Raises:
    errors.ConfigError: if the tokenizer cannot be loaded, it has no chat
      template or end-of-sequence token, `chat_template` cannot be read, or
      `template_kwargs` is not a JSON object of variables.
  """
  where = os.fspath(directory)
  try:
    # By default, transformers prompts on the terminal before running remote
    # code.
    tokenizer = transformers.AutoTokenizer.from_pretrained(
      where, trust_remote_code=False
    )
  except (OSError, ValueError, KeyError) as error:
    raise errors.ConfigError(
      "Failed to load the tokenizer.",
      where=where,
      why=_first_line(error),
      fix="Set the path to a folder with tokenizer.json and "
      "tokenizer_config.json, or to a Hub id that this machine can download.",
    ) from error
  if tokenizer.eos_token is None:
    raise errors.ConfigError(
      "The tokenizer has no eos_token.",
      where=where,
      why="tokenizer_config.json does not set it.",
      fix='Set "eos_token" in tokenizer_config.json to a special token of the '
      "vocabulary.",
    )
  if chat_template:
    tokenizer.chat_template = _read_template(tokenizer, chat_template)
  if with_template and not tokenizer.chat_template:
    raise errors.ConfigError(
      "The tokenizer has no chat template.",
      where=where,
      why="Base models often have none; conversations cannot be rendered.",
      fix="Set --config.model.chat_template (or student, teacher) to chatml, "
      "to none for plain text, or to a file with a Jinja template.",
    )
  if template_kwargs:
    defaults, template = _defaults(template_kwargs), tokenizer.chat_template
    tokenizer.chat_template = (
      {name: defaults + text for name, text in template.items()}
      if isinstance(template, dict)
      else defaults + template
    )
  return tokenizer


def _read_template(tokenizer: Tokenizer, name: str) -> str:
  """Returns a built-in template, or that of a file."""
  if name in _TEMPLATES:
    # A template has to add what the tokenizer adds to plain text.
    first = tokenizer.encode("a")[0]
    has_bos = tokenizer.bos_token is not None and (
      first == tokenizer.bos_token_id
    )
    return "{{ bos_token }}" * has_bos + _TEMPLATES[name]
  try:
    return pathlib.Path(name).read_text("utf-8")
  except (OSError, ValueError) as error:
    raise errors.ConfigError(
      "Failed to read the chat template.",
      where=f"--config.model.chat_template={name}",
      why=_first_line(error),
      fix=f"Set it to {' or '.join(_TEMPLATES)}, or to a file with a Jinja "
      "template.",
    ) from error


def _defaults(template_kwargs: str) -> str:
  """Returns Jinja statements that set variables which are not defined."""
  try:
    values = json.loads(template_kwargs)
  except ValueError:
    values = None
  if not isinstance(values, dict) or not all(map(_VARIABLE.fullmatch, values)):
    raise errors.ConfigError(
      "chat_template_kwargs must be a JSON object of template variables, got "
      f"{template_kwargs!r}.",
      where="chat_template_kwargs",
      why="Its keys are variables of the chat template.",
      fix="Set it to '{\"enable_thinking\": false}', for example, or to ''.",
    )
  return "".join(
    f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}"
    "{%- endif %}"
    for name, value in values.items()
  )


def _literal(value: Any) -> str:  # Any: JSON.
  """Returns a JSON value as a Jinja literal, where null is `none`."""
  return "none" if value is None else json.dumps(value)


def fingerprint(tokenizer: Tokenizer) -> str:
  """Returns a SHA-256 digest of the vocabulary and the chat template."""
  parts = (sorted(tokenizer.get_vocab().items()), tokenizer.chat_template)
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def check_vocabulary(
  tokenizer: Tokenizer, vocab_size: int, directory: str | os.PathLike[str]
) -> None:
  """Validates that the tokenizer's ids are below the model's `vocab_size`.

  Raises:
    errors.ConfigError: if the tokenizer produces larger ids.
  """
  # Other added tokens are not checked: they may be unused, e.g. Gemma's image
  # tokens.
  used = tokenizer.pad_token_id, tokenizer.eos_token_id
  largest = max(
    tokenizer.vocab_size - 1, *(i for i in used if isinstance(i, int))
  )
  if largest >= vocab_size:
    raise errors.ConfigError(
      "The tokenizer does not match the model.",
      where=os.fspath(directory),
      why=f"It produces ids up to {largest}, but config.json has a vocab_size "
      f"of {vocab_size}.",
      fix="Copy the tokenizer files from the checkpoint of the weights.",
    )


def render(
  tokenizer: Tokenizer, messages: Sequence[types.Message]
) -> tuple[str, tuple[int, ...]]:
  """Renders a prompt that ends with the header of the assistant's turn.

  Returns:
    The text and its token ids.

  Raises:
    errors.DataError: if the template rejects the messages.
  """
  text = _apply_template(tokenizer, messages, add_header=True)
  return text, tuple(_encode(tokenizer, text))


def tokenize(
  tokenizer: Tokenizer, messages: Sequence[types.Message]
) -> tuple[list[int], list[bool]]:
  """Tokenizes a conversation and computes its loss mask.

      text       <|user|>  Q  <|end|>  <|assistant|>  A  <|end|>  newline
      loss_mask     0      0     0           0        1     1        0

  Prompts and completions are encoded separately. So no token spans their
  border, and the first prompt has the same ids as in `render`.

  Returns:
    Token ids, and a loss mask that is True on the tokens of the assistant's
    turns and their end-of-turn tokens, and False on headers and on the newline
    that ChatML adds after a turn.

  Raises:
    errors.DataError: if there is no assistant turn, the template rejects the
      messages, or it renders an assistant turn differently when others follow.
    errors.ConfigError: if the template does not end assistant turns with a
      special token, or the tokenizer cannot encode a text in parts.
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


def tokenize_text(
  tokenizer: Tokenizer, text: str
) -> tuple[list[int], list[bool]]:
  """Tokenizes plain text, which ends with the end-of-sequence token.

  Returns:
    Token ids, and a loss mask that is True on all tokens but the first, which
    no token precedes.
  """
  token_ids = list(tokenizer.encode(text))
  end = _encode(tokenizer, str(tokenizer.eos_token))
  if token_ids[-1:] != end:
    token_ids += end
  return token_ids, [i > 0 for i in range(len(token_ids))]


def marked(
  tokenizer: Tokenizer, token_ids: Iterable[int], loss_mask: Iterable[bool]
) -> str:
  """Decodes tokens, special ones too, with those of the loss in `[[ ]]`."""
  pairs = zip(map(int, token_ids), loss_mask, strict=True)
  texts = []
  for counts, run in itertools.groupby(pairs, lambda pair: bool(pair[1])):
    text = tokenizer.decode(
      [token_id for token_id, _ in run], clean_up_tokenization_spaces=False
    )
    texts.append(f"[[{text}]]" if counts else text)
  return "".join(texts)


def stop_token_ids(
  tokenizer: Tokenizer, directory: str | os.PathLike[str]
) -> tuple[int, ...]:
  """Returns the sorted ids of the tokens that stop a completion.

  These are the tokenizer's end-of-sequence token and the eos_token_id of
  generation_config.json, if `directory` has this file.

  Raises:
    errors.ConfigError: if the file is invalid.
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
      raise _bad_generation_config(path, f"{token_id!r} is not a token id.")
  return tuple(sorted(ids))


def decode(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
  """Returns the text of `token_ids`, without special tokens.

  The tags of thinking are kept, which are special tokens of some models.
  """
  hidden = _hidden_ids(tokenizer)
  texts = tokenizer.batch_decode(
    [[token_id for token_id in token_ids if token_id not in hidden]],
    skip_special_tokens=False,
    clean_up_tokenization_spaces=False,
  )
  return texts[0]


@functools.lru_cache(maxsize=8)
def _hidden_ids(tokenizer: Tokenizer) -> frozenset[int]:
  """Returns the ids that `decode` leaves out."""
  return frozenset(
    token_id
    for token_id, token in tokenizer.added_tokens_decoder.items()
    if token.special and token.content not in _THINKING_TAGS
  )


def opens_thinking(rendered: str) -> bool:
  """Returns whether a rendered prompt ends with an open thinking tag."""
  return _OPENED.search(rendered) is not None


def is_thinking(text: str, *, is_open: bool) -> bool:
  """Returns whether a text ends inside of the thinking.

  Args:
    text: of a completion.
    is_open: whether the prompt has opened the thinking.
  """
  matches = list(_THINKING.finditer(_opened(text, is_open)))
  return bool(matches) and not _THINKING_END.search(matches[-1][0])


def without_thinking(text: str, *, is_open: bool) -> str:
  """Returns the stripped text outside of the thinking.

      <think> t t t </think> a a a      a a a
      t t t </think> a a a              a a a, also if not `is_open`
      <think> t t t                     nothing

  Args:
    text: of a completion.
    is_open: whether the prompt has opened the thinking.
  """
  outside = _THINKING.sub("", _opened(text, is_open))
  return _THINKING_END.split(outside)[-1].strip()


def _opened(text: str, is_open: bool) -> str:
  return f"<think>{text}" if is_open else text


def _written_spans(
  tokenizer: Tokenizer, messages: Sequence[types.Message], text: str
) -> Iterator[tuple[int, int]]:
  """Yields the span of each assistant turn, including its end-of-turn token."""
  turns = [i for i, turn in enumerate(messages) if turn.role == "assistant"]
  if not turns:
    raise _bad_conversation(
      messages,
      why="It has no assistant turn, so no token has a loss.",
      fix="Add an assistant turn to the row, or remove the row.",
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
      raise _bad_template(turn, "It ends no turn with a special token.")
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
  """Returns the end of a turn that is rendered differently as the last turn.

  Qwen3's template adds an empty thinking block to the last turn and removes the
  thinking of earlier turns. A turn whose thinking was removed cannot be
  trained: its completion is not in `text`.
  """
  content = messages[turn].content
  for written in (content, content.strip()):
    for closing in specials:
      rendered = header + written + closing
      if text.startswith(rendered):
        return len(rendered)
  raise _bad_conversation(
    messages,
    why=f"The chat template renders assistant turn {turn + 1} differently in "
    "the conversation than during generation.",
    fix="Split the conversation into rows that end with their only assistant "
    "turn, or change the template.",
  )


def _check_parts(tokenizer: Tokenizer, text: str, token_ids: list[int]) -> None:
  """Raises if the tokenizer adds characters to each text it encodes."""
  whole = _encode(tokenizer, text)
  if whole != token_ids and tokenizer.decode(whole) != tokenizer.decode(
    token_ids
  ):
    raise errors.ConfigError(
      "The tokenizer cannot encode a conversation in parts.",
      where=repr(text[:80]),
      why="It adds characters, often a space, to the start of every text.",
      fix="Use a tokenizer without a prefix space (add_prefix_space, "
      "add_dummy_prefix or legacy set to false).",
    )


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
  # The template already adds all special tokens, including a leading one.
  return tokenizer.encode(text, add_special_tokens=False)


def _special_tokens(tokenizer: Tokenizer) -> tuple[str, ...]:
  added = tokenizer.added_tokens_decoder.values()
  return tuple(token.content for token in added if token.special)


def _apply_template(
  tokenizer: Tokenizer, messages: Sequence[types.Message], *, add_header: bool
) -> str:
  """Renders messages, followed by an assistant header if `add_header`."""
  try:
    text = tokenizer.apply_chat_template(
      [dataclasses.asdict(message) for message in messages],
      tokenize=False,
      add_generation_prompt=add_header,
    )
  except (jinja2.TemplateError, ValueError, TypeError) as error:
    raise _bad_conversation(
      messages,
      why=f"The chat template rejects it: {_first_line(error)}",
      fix="Use the order of turns that the model expects: often an optional "
      "system turn, then alternating user and assistant turns.",
    ) from error
  return str(text)


def _bad_conversation(
  messages: Sequence[types.Message], *, why: str, fix: str
) -> errors.DataError:
  first = repr(messages[0].content[:60]) if messages else "no turn"
  return errors.DataError(
    "Invalid conversation.",
    where=f"{len(messages)} turns, starting with {first}",
    why=why,
    fix=fix,
  )


def _bad_template(turn: str, why: str) -> errors.ConfigError:
  return errors.ConfigError(
    "The chat template is not supported for training.",
    where=f"end of the rendered turn: {turn[-80:]!r}",
    why=why,
    fix="Use the template of an instruction-tuned model of this family.",
  )


def _bad_generation_config(path: pathlib.Path, why: str) -> errors.ConfigError:
  return errors.ConfigError(
    "Failed to read the stop tokens.",
    where=str(path),
    why=why,
    fix="Set eos_token_id to a token id or a list of them, or delete the file.",
  )


def _first_line(error: Exception) -> str:
  return f"{type(error).__name__}: {error}".splitlines()[0]
