# SPDX-License-Identifier: Apache-2.0
"""Prompt templates of the protocol, and extraction of teachings."""

import dataclasses
import re

from atlas_jax import errors

_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
# Matches the innermost pair: an unclosed tag does not swallow the next one.
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
  """Prompt templates with the placeholders {question}, {probe}, {teaching}.

  `probe` and `baseline` contain the question; `teach` the question and the
  student's probe; `taught` the question and the teaching.
  """

  probe: str
  teach: str
  taught: str
  baseline: str

  def __post_init__(self) -> None:
    """Validates the placeholders of each template."""
    for name, fields in _FIELDS.items():
      found = set(_PLACEHOLDER.findall(getattr(self, name)))
      if found != fields:
        raise errors.ConfigError(
          f"Template {name!r} must have the placeholders {sorted(fields)}, got "
          f"{sorted(found)}.",
          where=f"templates.{name}",
          why="Each lower-case word in braces is a placeholder.",
          fix="Use every required placeholder and no others.",
        )


def fill(template: str, **fields: str) -> str:
  """Replaces the placeholders of a template in one pass.

  Values are not parsed for placeholders: braces in a question, even "{probe}",
  are kept.

  Raises:
    ValueError: if the template's placeholders are not exactly `fields`.
  """
  found = set(_PLACEHOLDER.findall(template))
  if found != set(fields):
    raise ValueError(
      f"Values must match the template's placeholders {sorted(found)}, got "
      f"values for {sorted(fields)}."
    )
  return _PLACEHOLDER.sub(lambda match: fields[match[1]], template)


def extract_teaching(text: str) -> str | None:
  """Returns the first teaching of a text without thinking.

  Returns:
    The stripped text between the tags, or None if there is no pair of tags or
    no text between them.
  """
  match = _TEACHING.search(text)
  return (match[1].strip() or None) if match else None
