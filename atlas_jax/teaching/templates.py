# SPDX-License-Identifier: Apache-2.0
"""The four prompts of the protocol, and the tag that holds a teaching."""

import dataclasses
import re

from atlas_jax import errors

_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
_PRIVATE = re.compile(r"<(think(?:ing)?)>.*?(?:</\1>|\Z)", re.DOTALL)
_PRIVATE_END = re.compile(r"</think(?:ing)?>")
# The innermost pair: an opening tag left open does not swallow the next one.
_TEACHING = re.compile(
  r"<teaching>((?:(?!<teaching>).)*?)</teaching>", re.DOTALL
)

_FIELDS = {
  "probe": {"question"},
  "teach": {"question", "probe"},
  "taught": {"question", "teaching"},
  "baseline": {"question"},
}


@dataclasses.dataclass(frozen=True)
class Templates:
  """What each role is asked, with {question}, {probe} and {teaching} to fill.

  `probe` and `baseline` hold the question; `teach` the question and the
  student's probe; `taught` the question and the teaching.
  """

  probe: str
  teach: str
  taught: str
  baseline: str

  def __post_init__(self) -> None:
    """Refuses a template that lacks a field or holds one nobody fills."""
    for name, fields in _FIELDS.items():
      found = set(_PLACEHOLDER.findall(getattr(self, name)))
      if found != fields:
        raise errors.ConfigError(
          f"Template {name!r} has the placeholders {sorted(found)}, but "
          f"{sorted(fields)} are filled.",
          where=f"templates.{name}",
          why="A lower-case word in braces is a placeholder.",
          fix="Use each of the listed placeholders, and no other.",
        )


def fill(template: str, **fields: str) -> str:
  """Replaces the placeholders of a template, all in one pass.

  What is filled in is never read as a template: braces in a question, even
  "{probe}", stay as they are.

  Raises:
    ValueError: if the template's placeholders are not exactly `fields`.
  """
  found = set(_PLACEHOLDER.findall(template))
  if found != set(fields):
    raise ValueError(
      f"The template has the placeholders {sorted(found)}, got values for "
      f"{sorted(fields)}."
    )
  return _PLACEHOLDER.sub(lambda match: fields[match[1]], template)


def extract_teaching(text: str) -> str | None:
  """Returns the first teaching outside the private thinking.

  Returns:
    The stripped text between the tags, or None where there is no such pair of
    tags or nothing between them. Thinking never becomes a teaching: also not a
    draft in tags within it, nor what follows a thinking tag left open.
  """
  # A chat template may open the thinking, so that only its end is written.
  public = _PRIVATE_END.split(_PRIVATE.sub("", text))[-1]
  match = _TEACHING.search(public)
  return (match[1].strip() or None) if match else None
