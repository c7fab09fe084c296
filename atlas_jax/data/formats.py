# SPDX-License-Identifier: Apache-2.0
"""Formats of known datasets: how columns map to messages and questions."""

from collections.abc import Mapping, Sequence
import dataclasses
import difflib
import re
from typing import Any

from atlas_jax import errors, types
from atlas_jax.data import rows

_COLUMN = re.compile(r"\{(\w+(?:\|\w+)*)\}")
_CHAT_COLUMNS = ("messages", "conversations")
_ROLES = {
  **{role: role for role in ("system", "user", "assistant")},
  **{"human": "user", "gpt": "assistant"},
}


@dataclasses.dataclass(frozen=True)
class Format:
  r"""How the rows of a kind of dataset are read.

  Texts are templates: `{column}` is the text of a column, `{a|b}` that of the
  first one that is not empty. Patterns are regular expressions in which `^` and
  `$` match at lines.

  If a row has a conversation in a column `messages` or `conversations`, it
  replaces the one built from `question`, `thinking` and `solution`.

  Attributes:
    system_prompt: first turn, unless the row has one; empty for none.
    question: the user's turn, and the question that a student is asked. For a
      row with a conversation, the last user turn; if turns precede it, the text
      of all turns up to it, each after its role.
    thinking: precedes the solution; left out if its columns are empty.
    solution: the assistant's turn.
    rewrites: pairs of pattern and replacement for `re.sub`, applied to the
      assistant's turns.
    answer: the reference answer. For a row with a conversation and without
      these columns, the assistant's turn after the last user turn.
    answer_pattern: the first group of its last match in `answer` is the final
      answer, and rows without a match are left out; empty to use all of it.
    worked: the worked solution, which reward R0 uses; may be empty. For a row
      with a conversation and without these columns, the assistant's turn, after
      the thinking.
    paraphrase: another wording of the question, or other numbers in it; used by
      evaluation only, and may be empty.
    paraphrase_answer: the final answer to the paraphrase; empty for `answer`.
    problem: identifies the problem when some are held out; empty for
      `question`, or the user's first turn of a conversation.
    keep: values of rows to keep, by column.
    need_messages: whether rows without a conversation are invalid.
    hub_id: Hub dataset for which format "auto" selects this format.
    sft_part: part of the dataset for fine-tuning; see `sources.Source`.
    questions_part: part of the dataset with questions.
  """

  system_prompt: str
  question: str
  thinking: str
  solution: str
  rewrites: tuple[tuple[str, str], ...]
  answer: str
  answer_pattern: str
  worked: str
  paraphrase: str
  paraphrase_answer: str
  problem: str
  keep: Mapping[str, Sequence[str]]
  need_messages: bool
  hub_id: str
  sft_part: str
  questions_part: str


_DEFAULT = Format(
  system_prompt="",
  question="{question|prompt}",
  # As in the templates of Qwen3 and DeepSeek-R1, including newlines.
  thinking="<think>\n{reasoning_trace}\n</think>\n\n",
  solution="{solution|ground_truth}",
  rewrites=(),
  answer="{answer|ground_truth|solution}",
  answer_pattern="",
  worked="{solution}",
  paraphrase="{paraphrase}",
  paraphrase_answer="{paraphrase_answer}",
  problem="",
  keep={},
  need_messages=False,
  hub_id="",
  sft_part="",
  questions_part="",
)
_ATLAS = dataclasses.replace(
  _DEFAULT,
  system_prompt=(
    "You are a teacher who adapts to each student. You see a problem and how a "
    "student means to solve it. Work in three phases. Analyse: say what the "
    "approach is and which parts of it are sound. Diagnose: name the gap or "
    "the misconception that will make it fail, if there is one. Intervene: "
    "direct the student's attention to what matters, ask a question that "
    "exposes the gap, and hint at the next step. Never give the answer away."
  ),
  question="{prompt|problem_text|question|input}",
  solution=(
    "Student Approach:\n{student_approach}\n\n"
    "Teacher Diagnosis:\n{teacher_diagnosis}\n\n"
    "Teacher Teaching:\n{teacher_teaching}"
  ),
  answer="{ground_truth|answer|solution}",
)
# Braces in a box may be nested two deep, as in \boxed{\frac{\sqrt{3}}{2}}.
_IN_BOX = r"(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*"

DATA_CONFIGS: Mapping[str, Format] = {
  "default": _DEFAULT,
  # Columns `question`, `probe` and `teaching`. The caller renders them into
  # `messages` with its teaching template.
  "guidance": dataclasses.replace(_DEFAULT, need_messages=True),
  "arc_atlas_v0": dataclasses.replace(
    _ATLAS,
    hub_id="Arc-Intelligence/Arc-ATLAS-Teach-v0",
    sft_part="training/sft.jsonl",
    questions_part="training/rl.jsonl",
  ),
  "arc_atlas_v1": dataclasses.replace(
    _ATLAS,
    hub_id="Arc-Intelligence/Arc-ATLAS-Teach-v1",
    questions_part="curriculum/arc_atlas_teach_rl.jsonl",
  ),
  "stratos": dataclasses.replace(
    _DEFAULT,
    rewrites=(
      (r"<\|begin_of_thought\|>\s*", "<think>\n"),
      (r"\s*<\|end_of_thought\|>\s*", "\n</think>\n\n"),
      (r"<\|begin_of_solution\|>\s*|\s*<\|end_of_solution\|>\s*", ""),
    ),
    answer_pattern=rf"\\boxed\{{({_IN_BOX})\}}",
    hub_id="bespokelabs/Bespoke-Stratos-17k",
    sft_part="train",
    questions_part="train",
  ),
  "big_math": dataclasses.replace(
    _DEFAULT,
    question="{prompt|problem|question}",
    answer="{solution|answer|ground_truth}",
    hub_id="open-r1/Big-Math-RL-Verified-Processed",
    sft_part="level_4_5/train",
    questions_part="level_4_5/train",
  ),
  "gsm8k": dataclasses.replace(
    _DEFAULT,
    solution="{answer}",
    # Removes calculator annotations, and adds the tag that the teaching
    # protocol's prompts ask for.
    rewrites=(
      (r"<<[^<>\n]*>>", ""),
      (r"\s*^####[ \t]*(.+?)\s*$", r"\n<solution>\1</solution>"),
    ),
    answer="{answer}",
    worked="{answer}",
    answer_pattern=r"^####[ \t]*(.+?)\s*$",
    hub_id="openai/gsm8k",
    sft_part="main/train",
    questions_part="main/train",
  ),
  "meta_math": dataclasses.replace(
    _DEFAULT,
    question="{query|question|problem}",
    solution="{response|solution}",
    answer="{response|solution|answer}",
    worked="{response|solution}",
    answer_pattern=r"(?:The answer is:?|^####)[ \t]*(.+?)\.?\s*$",
    # Most queries rephrase another one.
    problem="{original_question|query|question|problem}",
    hub_id="meta-math/MetaMathQA",
    sft_part="train",
    questions_part="train",
  ),
}


def find(
  name: str,
  place: str,
  formats: Mapping[str, Mapping[str, Any]],  # Any: config values.
) -> Format:
  """Returns the format with the given name.

  Args:
    name: a key of `DATA_CONFIGS` or of `formats`; "auto" selects the format
      whose `hub_id` is `place`, or else "default".
    place: see `sources.Source`.
    formats: custom formats, each as the fields that differ from the format
      named by `like`, or else from "default".

  Raises:
    errors.ConfigError: if the format is unknown or has invalid fields.
  """
  if name == "auto":
    for known in DATA_CONFIGS.values():
      if known.hub_id and known.hub_id.lower() == place.lower():
        return known
    return _DEFAULT
  if name not in formats:
    return _known(name, DATA_CONFIGS)
  changes = dict(formats[name])
  like = _known(str(changes.pop("like", "default")), DATA_CONFIGS)
  try:
    made = dataclasses.replace(like, **changes)
    for pattern, replacement in made.rewrites:
      re.sub(pattern, replacement, "")
    if made.answer_pattern and re.compile(made.answer_pattern).groups != 1:
      raise ValueError("answer_pattern must have exactly one group.")
  except (TypeError, ValueError, re.error) as error:
    fields = ", ".join(field.name for field in dataclasses.fields(Format))
    raise errors.ConfigError(
      f"Invalid data format {name!r}: {error}",
      where=f"--config.data.formats.{name}",
      why="A format must have known fields and valid regular expressions.",
      fix=f"Its fields are like, {fields}; see atlas_jax/data/formats.py.",
    ) from error
  return made


def _known(name: str, formats: Mapping[str, Format]) -> Format:
  if name in formats:
    return formats[name]
  close = difflib.get_close_matches(name, formats, n=1)
  raise errors.ConfigError(
    f"Unknown data format {name!r}.",
    where="--config.data.format",
    why=f"The formats are {', '.join(formats)}.",
    fix=f"Did you mean {close[0]!r}?"
    if close
    else "Set one of them, or add yours to config.data.formats.",
  )


def excluded_by(row: rows.Row, fmt: Format) -> str:
  """Returns the column that excludes the row; empty if the row is kept."""
  for column, values in fmt.keep.items():
    if rows.optional_text(row, column) not in {str(value) for value in values}:
      return column
  return ""


def to_messages(row: rows.Row, fmt: Format) -> list[types.Message]:
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
        f"{', '.join(row.values) or 'none'}.",
        fix='Render the row into "messages" first, a list of {"role": ..., '
        '"content": ...}.',
      )
    written = _fill_optional(fmt.thinking, row) + _fill(fmt.solution, row)
    messages = [
      types.Message("user", _fill(fmt.question, row)),
      types.Message("assistant", written),
    ]
  if fmt.system_prompt and messages[0].role != "system":
    messages.insert(0, types.Message("system", fmt.system_prompt))
  return [
    dataclasses.replace(turn, content=_rewritten(turn.content, fmt))
    if turn.role == "assistant"
    else turn
    for turn in messages
  ]


def to_question(row: rows.Row, fmt: Format) -> types.Question | None:
  """Returns the question of a row; None without a match of answer_pattern.

  Its id is the column `row_id` or `id`, or else its file and line. The column
  `difficulty` is optional.

  Raises:
    errors.DataError: if a column is missing or is not text, or a conversation
      has no answer.
  """
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
    question, answer = _fill(fmt.question, row), _fill(fmt.answer, row)
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


def to_problem(row: rows.Row, fmt: Format) -> str:
  """Returns the text that identifies the row's problem.

  Raises:
    errors.DataError: if a column is missing or is not text.
  """
  problem = _fill_optional(fmt.problem or fmt.question, row)
  messages = _chat(row)
  if not problem and messages:
    return messages[_user_turns(row, messages)[0]].content
  return problem or _fill(fmt.question, row)


def _fill(template: str, row: rows.Row) -> str:
  """Fills a template with the row's columns, which must not be empty."""
  return _COLUMN.sub(
    lambda match: rows.text(row, *match[1].split("|")), template
  )


def _fill_optional(template: str, row: rows.Row) -> str:
  """Fills a template with stripped columns; empty if all columns are."""
  columns = "|".join(_COLUMN.findall(template)).split("|")
  if not any(rows.optional_text(row, column) for column in columns):
    return ""
  return _COLUMN.sub(
    lambda match: rows.text(row, *match[1].split("|")).strip(), template
  )


def _rewritten(text: str, fmt: Format) -> str:
  for pattern, replacement in fmt.rewrites:
    text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
  return text


def _chat(row: rows.Row) -> list[types.Message]:
  """Returns the conversation of a row; empty if it has none."""
  column = next((c for c in _CHAT_COLUMNS if row.values.get(c) is not None), "")
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
  row: rows.Row, messages: Sequence[types.Message], fmt: Format
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


def _without_thinking(text: str, fmt: Format) -> str:
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
