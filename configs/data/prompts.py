# SPDX-License-Identifier: Apache-2.0
"""The four prompts of the protocol, for instruction-tuned models."""

import ml_collections


def get_templates() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(  # teaching.templates.Templates
    dict(
      # Prompt for the student's plan, with {question}.
      probe=(
        "{question}\n\n"
        "Do not solve this yet. In two or three short sentences, name the kind "
        "of problem it is, the steps you plan to take, and what you are unsure "
        "about."
      ),
      # Prompt for the teaching, with {question} and {probe}.
      teach=(
        "A student is about to work on a problem. You see the problem and the "
        "plan the student wrote for it.\n\n"
        "Problem:\n{question}\n\n"
        "The student's plan:\n{probe}\n\n"
        "First judge the plan privately inside <thinking></thinking>: what is "
        "right, what is missing, what will go wrong. Then write to the student "
        "inside <teaching></teaching>. If the plan is sound, confirm it in a "
        "sentence. If it is not, say which step to change and how. The student "
        "reads only <teaching>: never put the final answer there, and do not "
        "carry the solution through."
      ),
      # Prompt for the taught answer, with {question} and {teaching}.
      taught=(
        "{question}\n\n"
        "Advice from your teacher:\n{teaching}\n\n"
        "Solve the problem step by step, using the advice where it helps. "
        "Write only the final answer inside <solution></solution>."
      ),
      # Prompt for the answer without a teaching, with {question}.
      baseline=(
        "{question}\n\n"
        "Solve the problem step by step. Write only the final answer inside "
        "<solution></solution>."
      ),
    )
  )
