# SPDX-License-Identifier: Apache-2.0
"""Paths of the small world, and the short prompts of its models."""

import ml_collections

DIRECTORY = ".cache/world"
STUDENT = f"{DIRECTORY}/student_run/export"
TEACHER = f"{DIRECTORY}/teacher_run/export"  # Warmed up by SFT.


def get_templates() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(  # teaching.templates.Templates
    dict(
      probe="Plan only: {question}",  # The student's plan.
      teach="Teach: {question}\nPlan: {probe}",  # The teaching.
      taught="Solve: {question}\nHint: {teaching}",  # The taught answer.
      baseline="Solve: {question}",  # The answer without a teaching.
    )
  )
