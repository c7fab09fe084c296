# SPDX-License-Identifier: Apache-2.0
"""Maps the columns of a dataset to those that formats read."""

import dataclasses

from atlas_jax import errors
from atlas_jax.data import rows

_QUESTIONS = ("question", "prompt", "instruction", "input")
_CHATS = ("messages", "conversations")
_JOINED = ("prompt", "completion")
# Field: the column that formats read, and columns that it replaces.
_READ_AS = {
  "messages": ("messages", "conversations"),
  "text": ("text", *_QUESTIONS, *_CHATS),
  "system": ("system", "system_prompt"),
  "question": ("question", *_QUESTIONS, *_CHATS, "text"),
  "context": ("context", "input"),
  "thinking": ("reasoning_trace",),
  "solution": ("solution",),
  "answer": ("answer", "ground_truth", "solution", "completion", "output"),
}


@dataclasses.dataclass(frozen=True)
class Columns:
  """Names of columns of the dataset; empty to use those of the format.

  Attributes:
    messages: a conversation.
    text: plain text, trained as a whole.
    system: the first turn.
    question: the user's turn.
    context: follows the question.
    thinking: precedes the solution.
    solution: the worked solution: the assistant's turn.
    answer: the reference answer; the assistant's turn without a solution.
  """

  messages: str = ""
  text: str = ""
  system: str = ""
  question: str = ""
  context: str = ""
  thinking: str = ""
  solution: str = ""
  answer: str = ""

  def rename(self, row: rows.Row) -> rows.Row:
    """Returns the row with its columns named as in formats.

    A mapped column replaces all columns that formats read instead of it, so
    that a mapped question is used even if the row has a conversation.

    Raises:
      errors.DataError: if a column is missing.
    """
    mapped = {name: column for name, column in vars(self).items() if column}
    if not mapped:
      return row
    replaced = {column for name in mapped for column in _READ_AS[name]}
    values = {k: v for k, v in row.values.items() if k not in replaced}
    for name, column in mapped.items():
      if column not in row.values:
        raise errors.DataError(
          f"Missing column: {column}.",
          where=row.where,
          why=f"The row has columns: {rows.listed(row)}.",
          fix=f"Set --config.data.columns.{name} to one of them.",
        )
      values[_READ_AS[name][0]] = row.values[column]
    return dataclasses.replace(row, values=values)

  def original(self, column: str) -> str:
    """Returns the dataset's name of a column that a format reads."""
    for name, (read_as, *_) in _READ_AS.items():
      if read_as == column and getattr(self, name):
        return str(getattr(self, name))
    return column


def join_turns(row: rows.Row) -> rows.Row:
  """Joins a prompt and a completion that are lists of turns to `messages`.

  One of them may be text, and the completion may be missing.
  """
  prompt, completion = row.values.get("prompt"), row.values.get("completion")
  if not isinstance(prompt, list) and not isinstance(completion, list):
    return row
  turns: list[object] = []
  for role, part in (("user", prompt), ("assistant", completion)):
    if isinstance(part, list):
      turns += part
    elif part is not None:
      turns.append({"role": role, "content": part})
  values = {k: v for k, v in row.values.items() if k not in _JOINED}
  return dataclasses.replace(row, values={**values, "messages": turns})
