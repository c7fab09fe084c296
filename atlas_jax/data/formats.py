# SPDX-License-Identifier: Apache-2.0
"""What the columns of a known dataset mean, and the conversation they make."""

from collections.abc import Mapping
import dataclasses

from atlas_jax import errors, types
from atlas_jax.data import sources

_ROLES = ("system", "user", "assistant")


@dataclasses.dataclass(frozen=True)
class Format:
  """How rows of one kind of dataset become conversations.

  `question`, `solution` and `reasoning_trace` are column names; the last may be
  absent from a row. A trace is written between `think_open` and `think_close`,
  in front of the solution. An empty `system_prompt` adds no turn. Rows that
  `need_messages` must bring their conversation, since their columns do not say
  how to render it.
  """

  system_prompt: str
  question: str
  solution: str
  reasoning_trace: str
  think_open: str
  think_close: str
  need_messages: bool


_DEFAULT = Format(
  system_prompt="",
  question="question",
  solution="solution",
  reasoning_trace="reasoning_trace",
  # As the templates of Qwen3 and DeepSeek-R1 write it, to the newline.
  think_open="<think>\n",
  think_close="\n</think>\n\n",
  need_messages=False,
)

DATA_CONFIGS: Mapping[str, Format] = {
  "default": _DEFAULT,
  # Columns `question`, `probe` and `teaching`: the caller's own teaching
  # template turns them into `messages`.
  "guidance": dataclasses.replace(
    _DEFAULT, solution="teaching", need_messages=True
  ),
}


def to_messages(row: sources.Row, fmt: Format) -> list[types.Message]:
  """Returns the conversation of a row.

  A column `messages`, a list of objects with `role` and `content`, is used as
  it is. Else the user asks the question, and the assistant answers with the
  reasoning trace, if there is one, and the solution.

  Raises:
    errors.DataError: if a column is missing or holds something else.
  """
  if row.values.get("messages") is not None:
    return _chat(row)
  if fmt.need_messages:
    raise errors.DataError(
      "A row has no messages.",
      where=row.where,
      why=f"Rows of this format must have them. Its columns are: "
      f"{', '.join(row.values) or 'none'}.",
      fix='Render the row into "messages", a list of {"role": ..., "content": '
      "...}, first.",
    )
  trace = sources.optional_text(row, fmt.reasoning_trace)
  if trace:
    trace = f"{fmt.think_open}{trace.strip()}{fmt.think_close}"
  messages = [
    types.Message("user", sources.text(row, fmt.question)),
    types.Message("assistant", trace + sources.text(row, fmt.solution)),
  ]
  if fmt.system_prompt:
    messages.insert(0, types.Message("system", fmt.system_prompt))
  return messages


def _chat(row: sources.Row) -> list[types.Message]:
  turns = row.values["messages"]
  if not isinstance(turns, list) or not turns:
    raise _bad_turn(row, "It is no list, or an empty one.")
  messages = []
  for number, turn in enumerate(turns, start=1):
    if not isinstance(turn, dict) or turn.get("role") not in _ROLES:
      raise _bad_turn(
        row, f"Turn {number} has no role out of {', '.join(_ROLES)}."
      )
    content = sources.as_text(
      turn.get("content"), name=f"Turn {number} of messages", where=row.where
    )
    messages.append(types.Message(turn["role"], content))
  return messages


def _bad_turn(row: sources.Row, why: str) -> errors.DataError:
  return errors.DataError(
    'Column "messages" is not a conversation.',
    where=row.where,
    why=why,
    fix='Write it as [{"role": "user", "content": "..."}, ...].',
  )
