# SPDX-License-Identifier: Apache-2.0
"""Arc-ATLAS-Teach as what GRPO asks of a teacher, in the same prompt and tags.

The format that the dataset has by itself is the original's: three labelled
paragraphs, which GRPO's prompts do not ask for. A recipe that wants this one:

  config.data.formats = arc_atlas.get_formats()
  config.data.format = "arc_atlas_tags"
"""

import ml_collections

from configs.data import prompts


def get_formats() -> ml_collections.ConfigDict:
  teach = prompts.get_templates().teach
  return ml_collections.ConfigDict(
    dict(
      arc_atlas_tags=dict(
        like="arc_atlas_v0",
        system_prompt="",
        question=teach.replace("{question}", "{problem_text}").replace(
          "{probe}", "{student_approach}"
        ),
        solution=(
          "<thinking>\n{teacher_diagnosis}\n</thinking>\n"
          "<teaching>\n{teacher_teaching}\n</teaching>"
        ),
        problem="{problem_text}",
      )
    )
  )
