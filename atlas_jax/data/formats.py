# SPDX-License-Identifier: Apache-2.0
"""Formats of known datasets: which columns hold messages and questions."""

from collections.abc import Mapping, Sequence
import dataclasses
import difflib
import re
from typing import Any

from atlas_jax import errors
from atlas_jax.data import rows

COLUMN = re.compile(r"\{(\w+(?:\|\w+)*)\}")
CHAT_COLUMNS = ("messages", "conversations")


@dataclasses.dataclass(frozen=True)
class Format:
  r"""How the rows of a kind of dataset are read.

  Texts are templates: `{column}` is the text of a column, `{a|b}` that of the
  first one that is not empty. Patterns are regular expressions in which `^` and
  `$` match at lines.

  If a row has a conversation in a column `messages` or `conversations`, or a
  list of turns as its `prompt`, it replaces the one built from `question`,
  `thinking` and `solution`; the latter two follow one that ends with the user.

  Attributes:
    text: plain text instead of a conversation, of which all tokens count for
      the loss; empty for conversations.
    system: first turn, unless the conversation has one.
    system_prompt: used where the columns of `system` are empty; not a template.
    question: the user's turn, and the question that a student is asked. For a
      row with a conversation, the last user turn; if turns precede it, the text
      of all turns up to it, each after its role.
    context: follows the question; left out if its columns are empty.
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
      `question` and `context`, or the user's first turn of a conversation.
    keep: values of rows to keep, by column.
    need_messages: whether rows without a conversation are invalid.
    hub_id: Hub dataset for which format "auto" selects this format.
    sft_part: part of the dataset for fine-tuning; see `sources.Source`.
    questions_part: part of the dataset with questions.
  """

  text: str
  system: str
  system_prompt: str
  question: str
  context: str
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
  text="",
  system="{system|system_prompt}",
  system_prompt="",
  question="{question|prompt}",
  context="\n\n{context}",
  # As in the templates of Qwen3 and DeepSeek-R1, including newlines.
  thinking="<think>\n{reasoning_trace}\n</think>\n\n",
  solution="{solution|ground_truth|answer}",
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
  "messages": dataclasses.replace(_DEFAULT, need_messages=True),
  "sharegpt": dataclasses.replace(_DEFAULT, need_messages=True),
  "alpaca": dataclasses.replace(
    _DEFAULT,
    question="{instruction}",
    context="\n\n{input}",
    solution="{output}",
    answer="{output}",
    worked="{output}",
  ),
  "prompt_completion": dataclasses.replace(
    _DEFAULT,
    question="{prompt}",
    solution="{completion}",
    answer="{answer|ground_truth|solution|completion}",
    worked="{solution|completion}",
  ),
  "text": dataclasses.replace(_DEFAULT, text="{text}"),
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
    system="",  # The same instructions to think in every row.
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


# Columns of formats that are recognized by them, in this order: the first
# format of which a row has a column of each group.
_RECOGNIZED: Mapping[str, tuple[tuple[str, ...], ...]] = {
  "messages": (("messages",),),
  "sharegpt": (("conversations",),),
  "alpaca": (("instruction",), ("output",)),
  "prompt_completion": (("prompt",), ("completion",)),
  "default": (("question", "prompt"), ("answer", "ground_truth", "solution")),
  "text": (("text",),),
}


def recognize(row: rows.Row) -> str:
  """Returns the name of the format that the row's columns belong to.

  Raises:
    errors.DataError: if the columns belong to no format.
  """
  present = {key for key, value in row.values.items() if rows.is_given(value)}
  for name, groups in _RECOGNIZED.items():
    if all(present.intersection(group) for group in groups):
      return name
  known = "; ".join(
    " with ".join(" or ".join(group) for group in groups)
    for groups in _RECOGNIZED.values()
  )
  raise errors.DataError(
    "No known format has the columns of this row.",
    where=row.where,
    why=f"The row has columns: {rows.listed(row)}. Known are: {known}.",
    fix="Map the columns, e.g. --config.data.columns.question=COLUMN "
    "--config.data.columns.answer=COLUMN, or set --config.data.format.",
  )


def find(
  name: str,
  place: str,
  formats: Mapping[str, Mapping[str, Any]],  # Any: config values.
) -> Format | None:
  """Returns the format with the given name.

  Args:
    name: a key of `DATA_CONFIGS` or of `formats`; "auto" selects the format
      whose `hub_id` is `place`, or else None: see `recognize`.
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
    return None
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


def name_of(fmt: Format, name: str) -> str:
  """Returns the name of a format that `find` returned for `name`, or found."""
  if name != "auto":
    return name
  return next(key for key, known in DATA_CONFIGS.items() if known is fmt)


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
