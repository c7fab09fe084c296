# SPDX-License-Identifier: Apache-2.0
"""Grades with math-verify; run by `isolated.Pool`, because it may hang."""

from collections.abc import Sequence
from typing import Any

import math_verify

from atlas_jax.rewards import answers


def grade(pair: Sequence[str]) -> bool:
  """Returns whether an answer equals the reference.

  math-verify's own timeouts are disabled: they need signals, and the caller
  kills this process at its deadline.

  Args:
    pair: a student's full answer, and the reference answer or solution.

  Raises:
    ValueError: if math-verify cannot parse the reference; any answer would be
      graded as wrong.
  """
  text, reference = pair
  truth = _parse(answers.declared(reference) or reference)
  if not truth:
    raise ValueError("math-verify cannot parse the reference.")
  found = _parse(answers.declared(text) or text)
  return bool(
    math_verify.verify(truth, found, timeout_seconds=0, raise_on_error=True)
  )


def _parse(text: str) -> list[Any]:  # Any: sympy's expressions, and strings.
  """Parses an answer as LaTeX, which most are, else as plain text."""
  for marked in (f"${text}$", text):
    parsed = math_verify.parse(
      marked,
      parsing_timeout=0,
      raise_on_error=True,
      fallback_mode="no_fallback",
    )
    if parsed:
      return parsed
  return []
