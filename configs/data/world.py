# SPDX-License-Identifier: Apache-2.0
"""Paths of the small world of `:smoke`, and the short prompts of its models."""

import ml_collections

DIRECTORY = ".cache/smoke_world"
STUDENT = f"{DIRECTORY}/student"
TEACHER = f"{DIRECTORY}/teacher"  # Warmed up by SFT.


def get_templates() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(  # teaching.templates.Templates
    dict(
      probe="Plan only: {question}",  # The student's plan.
      teach="Teach: {question}\nPlan: {probe}",  # The teaching.
      taught="Solve: {question}\nHint: {teaching}",  # The taught answer.
      baseline="Solve: {question}",  # The answer without a teaching.
    )
  )
