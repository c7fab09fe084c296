# SPDX-License-Identifier: Apache-2.0
"""Views of a row: its text, conversation, question and problem."""

from collections.abc import Sequence
import dataclasses
import re

from atlas_jax import errors, types
from atlas_jax.data import formats, rows

_ROLES = {
  **{role: role for role in ("system", "user", "assistant")},
  **{"human": "user", "gpt": "assistant", "chatgpt": "assistant"},
}


def columns_used(row: rows.Row, fmt: formats.Format) -> dict[str, str]:
  """Returns the columns that are used of a row, by what they are used for."""
  if fmt.text:
    return {"text": _used(fmt.text, row)}
  chat = _chat_column(row)
  read = (
    {"conversation": f"{{{chat}}}"}
    if chat
    else {
      "question": fmt.question,
      "context": fmt.context,
      "thinking": fmt.thinking,
      "solution": fmt.solution,
    }
  )
  read |= {"system": fmt.system, "answer": fmt.answer}
  used = {name: _used(template, row) for name, template in read.items()}
  return {name: column for name, column in used.items() if column}


def _used(template: str, row: rows.Row) -> str:
  """Returns the columns that a template is filled with."""
  groups = [group.split("|") for group in formats.COLUMN.findall(template)]
  used = [
    next((c for c in group if rows.is_given(row.values.get(c))), "")
    for group in groups
  ]
  return ", ".join(filter(None, used))


def to_text(row: rows.Row, fmt: formats.Format) -> str:
  """Returns the plain text of a row, of a format with `text`.

  Raises:
    errors.DataError: if the column is missing or is not text.
  """
  return _fill(fmt.text, row)


def excluded_by(row: rows.Row, fmt: formats.Format) -> str:
  """Returns the column that excludes the row; empty if the row is kept."""
  for column, values in fmt.keep.items():
    if rows.optional_text(row, column) not in {str(value) for value in values}:
      return column
  return ""


def to_messages(row: rows.Row, fmt: formats.Format) -> list[types.Message]:
  """Returns the conversation of a row.

  Raises:
    errors.DataError: if a column is missing or is not text.
  """
  messages = _chat(row)
  if not messages:
    if fmt.need_messages:
      raise errors.DataError(
        'The row has no "messages".',
        where=row.where,
        why="They are required by this format. The row has columns: "
        f"{rows.listed(row)}.",
        fix='Render the row into "messages" first, a list of {"role": ..., '
        '"content": ...}.',
      )
    written = _fill_optional(fmt.thinking, row) + _fill(fmt.solution, row)
    messages = [
      types.Message("user", _question(row, fmt)),
      types.Message("assistant", written),
    ]
  elif messages[-1].role == "user" and _used(fmt.solution, row):
    written = _fill_optional(fmt.thinking, row) + _fill(fmt.solution, row)
    messages.append(types.Message("assistant", written))
  system = _fill_optional(fmt.system, row) or fmt.system_prompt
  if system and messages[0].role != "system":
    messages.insert(0, types.Message("system", system))
  return [
    dataclasses.replace(turn, content=_rewritten(turn.content, fmt))
    if turn.role == "assistant"
    else turn
    for turn in messages
  ]


def to_question(row: rows.Row, fmt: formats.Format) -> types.Question | None:
  """Returns the question of a row; None without a match of answer_pattern.

  Its id is the column `row_id` or `id`, or else its file and line. The column
  `difficulty` is optional.

  Raises:
    errors.DataError: if a column is missing or is not text, a conversation has
      no answer, or the format is plain text.
  """
  if fmt.text:
    raise errors.DataError(
      "Plain text has no question.",
      where=row.where,
      why="The format of the row is plain text, which only SFT reads.",
      fix="Map the columns with --config.data.columns.question=COLUMN "
      "--config.data.columns.answer=COLUMN.",
    )
  messages = _chat(row)
  if messages:
    question, reply = _last_exchange(row, messages, fmt)
    answer = _fill_optional(fmt.answer, row) or reply
    if not answer:
      raise errors.DataError(
        "The conversation has no answer.",
        where=row.where,
        why="No assistant turn follows the last user turn. Its roles are "
        f"{', '.join(turn.role for turn in messages)}.",
        fix="Add the answer as an assistant turn or in a column, or remove the "
        "row.",
      )
    written = _without_thinking(reply, fmt)
  else:
    question, answer = _question(row, fmt), _fill(fmt.answer, row)
    written = ""
  if fmt.answer_pattern:
    found = re.findall(fmt.answer_pattern, answer, re.MULTILINE)
    if not found:
      return None
    answer = found[-1]
  worked = _rewritten(_fill_optional(fmt.worked, row), fmt)
  return types.Question(
    row_id=rows.optional_text(row, "row_id")
    or rows.optional_text(row, "id")
    or row.row_id,
    question=question,
    answer=answer,
    difficulty=rows.optional_text(row, "difficulty"),
    solution=worked or written,
    paraphrase=_fill_optional(fmt.paraphrase, row),
    paraphrase_answer=_fill_optional(fmt.paraphrase_answer, row),
  )


def to_problem(row: rows.Row, fmt: formats.Format) -> str:
  """Returns the text that identifies the row's problem.

  Raises:
    errors.DataError: if a column is missing or is not text.
  """
  if fmt.text:
    return to_text(row, fmt)
  if problem := _fill_optional(fmt.problem, row):
    return problem
  messages = _chat(row)
  if messages and not _used(fmt.question, row):
    return messages[_user_turns(row, messages)[0]].content
  return _question(row, fmt)


def _question(row: rows.Row, fmt: formats.Format) -> str:
  return _fill(fmt.question, row) + _fill_optional(fmt.context, row)


def _fill(template: str, row: rows.Row) -> str:
  """Fills a template with the row's columns, which must not be empty."""
  return formats.COLUMN.sub(
    lambda match: rows.text(row, *match[1].split("|")), template
  )


def _fill_optional(template: str, row: rows.Row) -> str:
  """Fills a template with stripped columns; empty if all columns are."""
  columns = "|".join(formats.COLUMN.findall(template)).split("|")
  if not any(rows.optional_text(row, column) for column in columns):
    return ""
  return formats.COLUMN.sub(
    lambda match: rows.text(row, *match[1].split("|")).strip(), template
  )


def _rewritten(text: str, fmt: formats.Format) -> str:
  for pattern, replacement in fmt.rewrites:
    text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
  return text


def _chat_column(row: rows.Row) -> str:
  """Returns the column of a row's conversation; empty if it has none."""
  given = (c for c in formats.CHAT_COLUMNS if row.values.get(c) is not None)
  return next(given, "")


def _chat(row: rows.Row) -> list[types.Message]:
  """Returns the conversation of a row; empty if it has none."""
  column = _chat_column(row)
  if not column:
    return []
  turns = row.values[column]
  if not isinstance(turns, list) or not turns:
    raise _bad_turn(row, column, "Expected a list that is not empty.")
  messages = []
  for number, turn in enumerate(turns, start=1):
    if not isinstance(turn, dict):
      raise _bad_turn(row, column, f"Turn {number} is not an object.")
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str) or role not in _ROLES:
      raise _bad_turn(
        row, column, f"Turn {number}: role must be one of {', '.join(_ROLES)}."
      )
    content = rows.as_text(
      turn.get("content", turn.get("value")),
      name=f"Turn {number} of {column}",
      where=row.where,
    )
    messages.append(types.Message(_ROLES[role], content))
  return messages


def _last_exchange(
  row: rows.Row, messages: Sequence[types.Message], fmt: formats.Format
) -> tuple[str, str]:
  """Returns the last user turn with its context, and the assistant's reply.

  The protocol's templates take one text as a question, so turns before the last
  user turn are part of it. Without a reply, it is empty.
  """
  last = _user_turns(row, messages)[-1]
  context = [
    f"{turn.role.capitalize()}: "
    + (
      _without_thinking(turn.content, fmt)
      if turn.role == "assistant"
      else turn.content
    )
    for turn in messages[:last]
  ]
  question = messages[last].content
  if context:
    question = "\n\n".join([*context, f"User: {question}"])
  replies = [t.content for t in messages[last:] if t.role == "assistant"]
  return question, replies[-1] if replies else ""


def _without_thinking(text: str, fmt: formats.Format) -> str:
  return _rewritten(text, fmt).rpartition("</think>")[2].strip()


def _user_turns(
  row: rows.Row, messages: Sequence[types.Message]
) -> Sequence[int]:
  """Returns the indices of the user's turns, of which there must be one."""
  found = [i for i, turn in enumerate(messages) if turn.role == "user"]
  if found:
    return found
  raise errors.DataError(
    "A conversation must have a user turn.",
    where=row.where,
    why=f"Its roles are {', '.join(turn.role for turn in messages)}.",
    fix="Add the question as a user turn, or remove the row.",
  )


def _bad_turn(row: rows.Row, column: str, why: str) -> errors.DataError:
  return errors.DataError(
    f'Column "{column}" is not a conversation.',
    where=row.where,
    why=why,
    fix='Write it as [{"role": "user", "content": "..."}, ...].',
  )
