# SPDX-License-Identifier: Apache-2.0
"""math-verify, to be run by `isolated.Pool`: it may hang, and needs signals."""

from collections.abc import Sequence
from typing import Any

import math_verify

from atlas_jax.rewards import answers


def grade(pair: Sequence[str]) -> bool:
  """Tells whether a text's answer equals the reference's.

  Its own timers are off: who calls has a deadline, after which the process is
  ended whatever it does.

  Args:
    pair: a student's whole answer, and the reference, alone or in a solution.

  Raises:
    ValueError: if math-verify cannot read the reference, so that nothing would
      be right.
  """
  text, reference = pair
  truth = _parse(answers.declared(reference) or reference)
  if not truth:
    raise ValueError("The reference holds nothing that can be verified.")
  found = _parse(answers.declared(text) or text)
  return bool(
    math_verify.verify(truth, found, timeout_seconds=0, raise_on_error=True)
  )


def _parse(text: str) -> list[Any]:  # Any: sympy's expressions, and strings.
  """Reads LaTeX, which most answers are once they are found; else a text."""
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
