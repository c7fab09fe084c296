# SPDX-License-Identifier: Apache-2.0
"""Tests filling of templates and extraction of teachings."""

import dataclasses

import pytest

from atlas_jax import chat, errors
from atlas_jax.teaching import templates
from configs.data import prompts

_PROMPTS = templates.Templates(**prompts.get_templates())


@pytest.mark.parametrize(
  "question",
  ["{probe}", "{question}", "{", "}}", "{0} {x!r:>{y}}", r"\boxed{\1 \g<0>}"],
)
def test_values_are_not_parsed_for_placeholders(question):
  filled = templates.fill(
    "Q: {question} P: {probe}", question=question, probe="P"
  )
  assert filled == f"Q: {question} P: P"


def test_braces_around_anything_but_a_name_are_text():
  template = r"{question} Answer in \boxed{} or {1, 2}."
  assert templates.fill(template, question="Q").startswith(
    "Q Answer in \\boxed{}"
  )


def test_fill_rejects_missing_or_extra_values():
  with pytest.raises(ValueError, match="probe"):
    templates.fill("{question}", question="Q", probe="P")
  with pytest.raises(ValueError, match="probe"):
    templates.fill("{question} {probe}", question="Q")


@pytest.mark.parametrize(
  ("name", "text"),
  [
    ("probe", "no question"),
    ("teach", "{question}"),
    ("taught", "{question} {guidance}"),
    ("baseline", "{question} {teaching}"),
  ],
)
def test_a_template_with_other_placeholders_is_rejected(name, text):
  with pytest.raises(errors.ConfigError, match=f"templates.{name}"):
    dataclasses.replace(_PROMPTS, **{name: text})


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("<thinking>secret</thinking><teaching> hint </teaching>", "hint"),
    ("<teaching>one</teaching><teaching>two</teaching>", "one"),
    ("<thinking><teaching>draft</teaching></thinking>", None),
    (
      "<thinking><teaching>draft</teaching></thinking><teaching>x</teaching>",
      "x",
    ),
    ("<thinking>cut off <teaching>draft</teaching>", None),
    ("opened by the template</think><teaching>x</teaching>", "x"),
    ("<teaching>draft</teaching></think> nothing", None),
    ("<teaching>torn <teaching>x</teaching>", "x"),
    ("</teaching><teaching>x</teaching>", "x"),
    ("<teaching>a<thinking>secret</thinking>b</teaching>", "ab"),
    ("<teaching>line\nline</teaching>", "line\nline"),
    ("<teaching>  </teaching>", None),
    ("<teaching>never closed", None),
    ("just a hint", None),
    ("", None),
  ],
)
def test_the_teaching_is_extracted_from_outside_the_thinking(text, expected):
  outside = chat.without_thinking(text, is_open=False)
  assert templates.extract_teaching(outside) == expected
